// The shared memory in which the ranks of a communicator meet, be they processes or threads.
//
// It is a file under /dev/shm only until all ranks have joined or one has given up; after that it lives as
// long as its maps do. A file left by processes killed before that is removed by the next maker of an id.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "api.h"

namespace emu {

constexpr int RANKS_MAX = 8;
constexpr size_t CHUNK_BYTES = 256 << 10;
constexpr size_t PIPE_BYTES = 64 << 10;

// What a rank does in a round, so that ranks which do different things are told apart.
struct Round {
  int kind, type, op, root;
  uint64_t count;
};

// A rank's side of the collectives: rounds it has written its chunk for, and rounds whose chunks it has read.
struct Seat {
  std::atomic<int> taken, device;
  std::atomic<uint64_t> written, read;
  Round round;
  char chunk[CHUNK_BYTES];
};

// Bytes from one rank to another, a ring.
struct Pipe {
  std::atomic<uint64_t> written, read;
  char ring[PIPE_BYTES];
};

struct Segment {
  std::atomic<int> joined;
  Seat seats[RANKS_MAX];
  Pipe pipes[RANKS_MAX][RANKS_MAX];  // [from][to]
};

NcclId new_id();
// Null if the system refuses.
Segment* open_segment(const NcclId& id);
void unlink_segment(const NcclId& id);

}  // namespace emu
