// The kernel harness: what a case file (NAME.cc beside this one, one for each kernel file) uses.
//
// A case launches kernels on exact-size buffers and compares with a naive double-precision twin. It runs
// under many seeds; each seed draws other shapes (use `run.random`) and another order of warps. The same case
// runs in three builds: plain (poisoned shared memory, guard pages), with a race detector, and with address
// and alignment checks.
//
//   CASE(rms_norm_matches_its_twin) {
//     int rows = run.random.between(1, 5), width = run.random.between(1, 700);
//     Buffer<float> x(rows * width), weight(width);
//     Buffer<bf16> out(rows * width);
//     for (float& value : x) value = run.random.normal();
//     ...
//     run.launch("rms_norm", {{unsigned(rows), 1, 1}, {256, 1, 1}, 0}, out.data(), x.data(), weight.data(),
//     width, eps); run.close("out", out, [&](size_t i) { return twin(i); }, 1e-2);
//   }
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../runtime/launch.h"
#include "cuda_shim.h"
#include "device.cuh"

namespace harness {

// Seeded numbers for shapes and values.
class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15ull) {}
  uint64_t next();
  // Both ends included.
  int between(int low, int high) { return low + int(next() % uint64_t(high - low + 1)); }
  bool coin() { return next() >> 40 & 1; }
  // In [low, high).
  float uniform(float low = -1, float high = 1);
  float normal();
  template <class T, size_t N>
  T one_of(const T (&values)[N]) {
    return values[next() % N];
  }

 private:
  uint64_t state_;
};

// Memory that ends exactly where its bytes end: at a guard page, or at a red zone with an address checker.
RIG_HIDDEN void* take_memory(size_t bytes);
RIG_HIDDEN void give_memory(void* memory, size_t bytes);

// `size` values of device memory, aligned to 256 bytes at its start when `size` allows, else to T. Poisoned:
// all bits set.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size), data_(static_cast<T*>(take_memory(size * sizeof(T)))) {}
  Buffer(std::initializer_list<T> values) : Buffer(values.size()) {
    size_t i = 0;
    for (const T& value : values) data_[i++] = value;
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    for (size_t i = 0; i < size_; i++) data_[i] = values[i];
  }
  ~Buffer() { give_memory(data_, size_ * sizeof(T)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  size_t size_;
  T* data_;
};

inline double number(bf16 value) { return double(float(value)); }
inline double number(float value) { return value; }
inline double number(int value) { return value; }
inline double number(unsigned value) { return value; }

// One run of one case under one seed.
class Run {
 public:
  explicit Run(uint64_t seed) : seed(seed), random(seed) {}

  const uint64_t seed;
  Random random;

  // Runs a kernel to its end. Arguments must have exactly the parameters' types (const behind a pointer may
  // be left out): an int for a long long is an error, as it would be on the device.
  template <class... A>
  void launch(const char* kernel, const rig::Launch& launch, A... arguments) {
    void* pointers[] = {static_cast<void*>(&arguments)..., nullptr};
    const char* types[] = {rig::TypeName<A>::get()..., nullptr};
    launch_checked(kernel, launch, sizeof...(A), pointers, types);
  }

  // |got - want| <= tolerance * (|want| + scale) for each value, want(i) a double; NaN is never close.
  template <class T, class Want>
  void close(const char* what, const Buffer<T>& got, Want want, double tolerance, double scale = 0.05) {
    for (size_t i = 0; i < got.size(); i++) {
      double g = number(got[i]), w = want(i);
      if (!(std::fabs(g - w) <= tolerance * (std::fabs(w) + scale)))
        return failed("%s[%zu] is %.9g, expected %.9g (tolerance %g)", what, i, g, w, tolerance);
    }
  }
  template <class T, class Want>
  void equal(const char* what, const Buffer<T>& got, Want want) {
    for (size_t i = 0; i < got.size(); i++) {
      double g = number(got[i]), w = double(want(i));
      if (!(g == w)) return failed("%s[%zu] is %.9g, expected %.9g", what, i, g, w);
    }
  }
  void check(bool holds, const char* format, ...) __attribute__((format(printf, 3, 4)));

  // Ends the run as failed.
  void failed(const char* format, ...) __attribute__((format(printf, 2, 3)));

 private:
  RIG_HIDDEN void launch_checked(const char* kernel, const rig::Launch& launch, size_t count,
                                 void** arguments, const char* const* types);
};

// Thrown to end a run; caught by main.
struct Failed {
  std::string text;
};

struct Case {
  const char* name;
  const char* file;
  void (*body)(Run&);
  Case* next;
  Case(const char* name, const char* file, void (*body)(Run&));
};

}  // namespace harness

using harness::Buffer;
using harness::Run;

#define CASE(NAME)                                             \
  static void NAME(Run& run);                                  \
  static harness::Case case_of_##NAME(#NAME, __FILE__, &NAME); \
  static void NAME([[maybe_unused]] Run& run)
