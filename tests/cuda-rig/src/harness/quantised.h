// A random quantised matrix, as the kernels take it, and its numbers.
#pragma once

#include "harness.h"

namespace harness {

struct Quantised {
  int bits, n, k, ldq, group, lead, groups;
  bool zeroed;  // int4 with zero points of its own; else the middle
  Buffer<unsigned char> q, zeros;
  Buffer<float> scales;

  Quantised(Random& random, int bits, int n, int k)
      : bits(bits),
        n(n),
        k(k),
        ldq((k * bits / 8 + 1 + 15) / 16 * 16),
        group(32 << random.between(0, 2)),
        lead(random.between(0, 2) ? 32 * random.between(0, group / 32 - 1) : random.between(0, group - 1)),
        groups((lead + k + group - 1) / group),
        zeroed(bits == 4 && random.coin()),
        q(size_t(n) * ldq),
        zeros(size_t(n) * groups),
        scales(size_t(n) * groups) {
    if (k % 2 == 0) ldq = (k * bits / 8 + 15) / 16 * 16;
    for (unsigned char& byte : q) byte = random.between(0, 255);  // the padding too: nothing may hang on it
    for (unsigned char& zero : zeros) zero = random.between(0, 15);
    for (float& scale : scales) scale = random.uniform(0.01f, 0.1f);
  }

  double weight(int row, int column) const {
    size_t place = size_t(row) * groups + (lead + column) / group;
    const unsigned char* bytes = &q[size_t(row) * ldq];
    if (bits == 8) return double(static_cast<signed char>(bytes[column])) * scales[place];
    int nibble = column % 2 ? bytes[column / 2] >> 4 : bytes[column / 2] & 15;
    return double(nibble - (zeroed ? zeros[place] : 8)) * scales[place];
  }
};

// Half of the time a width that the fast path takes.
inline int any_k(Random& random) {
  return random.coin() ? 8 * random.between(1, 80) : random.between(1, 300);
}

}  // namespace harness
