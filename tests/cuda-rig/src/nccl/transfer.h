// How bytes get from rank to rank: collectives in rounds of chunks, point to point through pipes.
//
// A transfer advances in steps that never wait, since one thread runs all streams of a process.
#pragma once

#include <cstddef>

#include "communicator.h"

namespace emu {

enum class Kind : int { AllReduce, AllGather, Broadcast, Send, Receive };

struct Transfer {
  Kind kind;
  Communicator* comm;
  const char* from;  // device memory
  char* to;
  size_t count;  // elements that this rank gives
  NcclType type;
  NcclOp op = NCCL_SUM;
  int root = 0;  // of a broadcast; the other rank of a send or receive

  // Progress.
  size_t at = 0;      // bytes done
  bool sent = false;  // this round's chunk is written
  bool done = false;

  bool collective() const { return kind != Kind::Send && kind != Kind::Receive; }
  size_t bytes() const;
};

size_t width_of(NcclType type);  // 0: a type that is not emulated

// Goes as far as it can; sets `done`. An aborted communicator's transfers are done at once, with whatever is
// there.
void advance(Transfer& transfer);

}  // namespace emu
