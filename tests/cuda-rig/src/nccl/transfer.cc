#include "transfer.h"

#include <algorithm>
#include <cstring>

#include "../driver/memory.h"

namespace emu {

namespace {

struct Bf16 {
  uint16_t bits;
  operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
  Bf16& operator=(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    bits = (word & 0x7fffffffu) > 0x7f800000u ? 0x7fff : uint16_t((word + 0x7fffu + (word >> 16 & 1)) >> 16);
    return *this;
  }
};

template <class Sum>
Sum combine(NcclOp op, Sum a, Sum b) {
  switch (op) {
    case NCCL_PROD:
      return a * b;
    case NCCL_MAX:
      return a < b ? b : a;
    case NCCL_MIN:
      return b < a ? b : a;
    default:
      return a + b;
  }
}

// In the order of ranks, for all ranks alike: their results are equal to the bit, as with the real library.
template <class T, class Sum>
void reduce(const Segment& segment, int ranks, NcclOp op, char* to, size_t bytes) {
  for (size_t i = 0; i < bytes / sizeof(T); i++) {
    Sum sum{};
    for (int rank = 0; rank < ranks; rank++) {
      T value;
      memcpy(&value, segment.seats[rank].chunk + i * sizeof(T), sizeof(T));
      sum = rank ? combine<Sum>(op, sum, Sum(value)) : Sum(value);
    }
    T result;
    result = sum;
    memcpy(to + i * sizeof(T), &result, sizeof(T));
  }
}

void reduce_as(NcclType type, const Segment& segment, int ranks, NcclOp op, char* to, size_t bytes) {
  switch (type) {
    case NCCL_FLOAT32:
      return reduce<float, float>(segment, ranks, op, to, bytes);
    case NCCL_FLOAT64:
      return reduce<double, double>(segment, ranks, op, to, bytes);
    case NCCL_BFLOAT16:
      return reduce<Bf16, float>(segment, ranks, op, to, bytes);
    case NCCL_INT32:
      return reduce<int32_t, int32_t>(segment, ranks, op, to, bytes);
    case NCCL_UINT32:
      return reduce<uint32_t, uint32_t>(segment, ranks, op, to, bytes);
    case NCCL_INT64:
      return reduce<int64_t, int64_t>(segment, ranks, op, to, bytes);
    case NCCL_UINT64:
      return reduce<uint64_t, uint64_t>(segment, ranks, op, to, bytes);
    case NCCL_INT8:
      return reduce<int8_t, int8_t>(segment, ranks, op, to, bytes);
    case NCCL_UINT8:
      return reduce<uint8_t, uint8_t>(segment, ranks, op, to, bytes);
  }
}

bool same(const Round& a, const Round& b) {
  return a.kind == b.kind && a.type == b.type && a.op == b.op && a.root == b.root && a.count == b.count;
}

bool gives_data(const Transfer& t) { return t.kind != Kind::Broadcast || t.root == t.comm->rank; }

// The real library hangs or mixes the data up; here the ranks hang, and say why.
bool mismatched(const Transfer& t) {
  Communicator& comm = *t.comm;
  const Round& mine = comm.segment->seats[comm.rank].round;
  for (int rank = 0; rank < comm.ranks; rank++) {
    const Round& other = comm.segment->seats[rank].round;
    if (same(mine, other)) continue;
    if (!comm.mismatched.exchange(true))
      report(
          "NCCL: rank %d is in a collective (kind %d, %llu elements), rank %d in another one (kind %d, %llu "
          "elements): "
          "they hang",
          comm.rank, mine.kind, (unsigned long long)mine.count, rank, other.kind,
          (unsigned long long)other.count);
    return true;
  }
  return false;
}

void deliver(Transfer& t, size_t part) {
  Communicator& comm = *t.comm;
  switch (t.kind) {
    case Kind::AllReduce:
      return reduce_as(t.type, *comm.segment, comm.ranks, t.op, t.to + t.at, part);
    case Kind::AllGather:
      for (int rank = 0; rank < comm.ranks; rank++)
        memcpy(t.to + size_t(rank) * t.bytes() + t.at, comm.segment->seats[rank].chunk, part);
      return;
    default:
      memcpy(t.to + t.at, comm.segment->seats[t.root].chunk, part);
  }
}

void advance_collective(Transfer& t) {
  Communicator& comm = *t.comm;
  Segment& segment = *comm.segment;
  Seat& mine = segment.seats[comm.rank];
  while (!t.done) {
    size_t part = std::min(CHUNK_BYTES, t.bytes() - t.at);
    if (!t.sent) {
      uint64_t next = comm.round + 1;
      for (int rank = 0; rank < comm.ranks; rank++)
        if (segment.seats[rank].read.load(std::memory_order_acquire) < next - 1) return;
      comm.round = next;
      if (gives_data(t)) memcpy(mine.chunk, t.from + t.at, part);
      mine.round = {int(t.kind), t.type, t.op, t.root, t.count};
      mine.written.store(next, std::memory_order_release);
      t.sent = true;
    }
    for (int rank = 0; rank < comm.ranks; rank++)
      if (segment.seats[rank].written.load(std::memory_order_acquire) < comm.round) return;
    if (mismatched(t)) return;
    deliver(t, part);
    mine.read.store(comm.round, std::memory_order_release);
    t.sent = false;
    t.at += part;
    t.done = t.at >= t.bytes();
  }
}

void advance_pipe(Transfer& t) {
  Communicator& comm = *t.comm;
  bool sends = t.kind == Kind::Send;
  Pipe& pipe = sends ? comm.segment->pipes[comm.rank][t.root] : comm.segment->pipes[t.root][comm.rank];
  uint64_t written = pipe.written.load(std::memory_order_acquire),
           read = pipe.read.load(std::memory_order_acquire);
  while (t.at < t.bytes()) {
    uint64_t place = sends ? written : read;
    size_t room = sends ? PIPE_BYTES - size_t(written - read) : size_t(written - read);
    size_t part = std::min({room, t.bytes() - t.at, PIPE_BYTES - size_t(place % PIPE_BYTES)});
    if (!part) return;
    if (sends) {
      memcpy(pipe.ring + place % PIPE_BYTES, t.from + t.at, part);
      pipe.written.store(written += part, std::memory_order_release);
    } else {
      memcpy(t.to + t.at, pipe.ring + place % PIPE_BYTES, part);
      pipe.read.store(read += part, std::memory_order_release);
    }
    t.at += part;
  }
  t.done = true;
}

// The memory is looked up when the transfer runs, as the copies' is.
bool memory_lives(Transfer& t) {
  bool reads = t.kind == Kind::Send || (t.collective() && gives_data(t));
  size_t into = t.kind == Kind::AllGather ? t.bytes() * size_t(t.comm->ranks) : t.bytes();
  bool lives = (!reads || is_live(Place::Device, t.from, t.bytes())) &&
               (t.kind == Kind::Send || is_live(Place::Device, t.to, into));
  if (lives) return true;
  report("NCCL: a buffer of a transfer of %zu bytes is not wholly in one live device allocation", t.bytes());
  kill_context(t.comm->context, CUDA_ERROR_ILLEGAL_ADDRESS);
  return false;
}

}  // namespace

size_t Transfer::bytes() const { return count * width_of(type); }

size_t width_of(NcclType type) {
  switch (type) {
    case NCCL_INT8:
    case NCCL_UINT8:
      return 1;
    case NCCL_BFLOAT16:
      return 2;
    case NCCL_INT32:
    case NCCL_UINT32:
    case NCCL_FLOAT32:
      return 4;
    case NCCL_INT64:
    case NCCL_UINT64:
    case NCCL_FLOAT64:
      return 8;
  }
  return 0;
}

void advance(Transfer& t) {
  if (t.done) return;
  if (t.comm->aborted || !t.count || (!t.at && !t.sent && !memory_lives(t))) {
    t.done = true;
    return;
  }
  if (t.collective())
    advance_collective(t);
  else
    advance_pipe(t);
}

}  // namespace emu
