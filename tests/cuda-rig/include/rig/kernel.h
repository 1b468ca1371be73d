// Kernels that this library or binary was built with, by name: KERNEL registers them before main.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "block.h"

namespace rig {

constexpr unsigned PARAMETERS_MAX = 32;

// One parameter: its size, and its type so that a harness can tell float* from int*.
struct Parameter {
  unsigned bytes, alignment;
  bool pointer;
  const char* type;
};

struct Kernel {
  const char* name;
  const char* file;
  unsigned threads_max;
  unsigned parameter_count;
  const Parameter* parameters;
  void (*call)(void** arguments);
  Kernel* next;
};

// A type as the compiler spells it; `const` behind a pointer is dropped, since a mutable buffer may be given
// for it.
template <class T>
struct TypeName {
  static const char* get() { return __PRETTY_FUNCTION__; }
};
template <class T>
struct TypeName<const T*> : TypeName<T*> {};

RIG_HIDDEN void add_kernel(Kernel* kernel);

template <auto F>
struct Entry;
template <class... A, void (*F)(A...)>
struct Entry<F> {
  static_assert(sizeof...(A) <= PARAMETERS_MAX, "too many parameters");
  template <size_t... I>
  static void unpack(void** arguments, std::index_sequence<I...>) {
    F(*static_cast<A*>(arguments[I])...);
  }
  static void call(void** arguments) { unpack(arguments, std::index_sequence_for<A...>{}); }

  Entry(const char* name, const char* file, unsigned threads_max) {
    static const Parameter parameters[] = {
        {unsigned(sizeof(A)), unsigned(alignof(A)), std::is_pointer<A>::value, TypeName<A>::get()}...};
    static Kernel kernel = {name, file, threads_max, unsigned(sizeof...(A)), parameters, call, nullptr};
    add_kernel(&kernel);
  }
};

}  // namespace rig

#define KERNEL(THREADS, NAME, PARAMETERS)                                       \
  static void NAME PARAMETERS;                                                  \
  static const rig::Entry<&NAME> rig_entry_of_##NAME(#NAME, __FILE__, THREADS); \
  static void NAME PARAMETERS
