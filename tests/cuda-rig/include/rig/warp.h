// Shuffles, votes and barriers, with the checks that real hardware leaves out.
#pragma once

#include <cstring>

#include "block.h"

namespace rig {

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  current->value = word;
  current->source = source;
  meet(Meeting::Shuffle, mask);
  word = current->result;
  memcpy(&value, &word, sizeof(T));
  return value;
}

inline void check_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("shuffle of width %d, not a power of two up to 32", width);
}

inline unsigned ballot(unsigned mask, bool vote) {
  current->value = vote;
  meet(Meeting::Ballot, mask);
  return unsigned(current->result);
}

}  // namespace rig

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  rig::check_width(width);
  return rig::shuffle(mask, value, (rig::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  rig::check_width(width);
  unsigned lane = rig::lane(), source = lane ^ bits;
  return rig::shuffle(mask, value, (source & ~(width - 1)) > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  rig::check_width(width);
  unsigned lane = rig::lane();
  return rig::shuffle(mask, value, (lane & (width - 1)) + delta < unsigned(width) ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  rig::check_width(width);
  unsigned lane = rig::lane();
  return rig::shuffle(mask, value, (lane & (width - 1)) >= delta ? lane - delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, int vote) { return rig::ballot(mask, vote != 0); }
inline int __any_sync(unsigned mask, int vote) { return rig::ballot(mask, vote != 0) != 0; }
inline int __all_sync(unsigned mask, int vote) { return rig::ballot(mask, vote == 0) == 0; }
inline void __syncwarp(unsigned mask = rig::FULL_MASK) { rig::meet(rig::Meeting::Sync, mask); }
inline void __syncthreads() { rig::block_barrier(); }
inline int __syncthreads_count(int value) { return int(rig::block_barrier_count(value != 0)); }
inline int __syncthreads_or(int value) { return rig::block_barrier_count(value != 0) != 0; }
inline int __syncthreads_and(int value) { return rig::block_barrier_count(value == 0) == 0; }

template <class T>
T rig_reduce(unsigned mask, T value, T (*combine)(T, T)) {
  // Every lane of the mask reads every other one's value: slow and plain.
  T result = value;
  bool first = true;
  for (unsigned lane = 0; lane < rig::WARP; lane++) {
    if (!(mask >> lane & 1)) continue;
    T other = rig::shuffle(mask, value, lane);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return rig_reduce<int>(mask, value, [](int a, int b) { return int(unsigned(a) + unsigned(b)); });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return rig_reduce<unsigned>(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return rig_reduce<int>(mask, value, [](int a, int b) { return a > b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return rig_reduce<unsigned>(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return rig_reduce<int>(mask, value, [](int a, int b) { return a < b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return rig_reduce<unsigned>(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
