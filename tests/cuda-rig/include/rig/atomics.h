// Atomic operations, relaxed as the device's: they order no other access, and a race detector is told so.
#pragma once

#include <cstring>

namespace rig {

template <class T, class Change>
T atomic_change(T* address, Change change) {
  T before;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  for (;;) {
    T after = change(before);
    if (__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return before;
  }
}

}  // namespace rig

template <class T>
T atomicAdd(T* address, T value) {
  return rig::atomic_change(address, [=](T old) { return T(old + value); });
}
template <class T>
T atomicSub(T* address, T value) {
  return rig::atomic_change(address, [=](T old) { return T(old - value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return rig::atomic_change(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, T value) {
  return rig::atomic_change(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, T value) {
  return rig::atomic_change(address, [=](T old) { return T(old | value); });
}
template <class T>
T atomicAnd(T* address, T value) {
  return rig::atomic_change(address, [=](T old) { return T(old & value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return rig::atomic_change(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return rig::atomic_change(address, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
