#include "gemm.h"

#include <cstdlib>
#include <cstring>

#include <vector>

namespace emu {

namespace {

// Eight sums side by side: vectors of the machine, whatever their width.
typedef float Lanes __attribute__((vector_size(32)));
constexpr int LANES = 8;

float widen(uint16_t half) {
  uint32_t word = uint32_t(half) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
uint16_t narrow(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((word + 0x7fffu + (word >> 16 & 1)) >> 16);
}

float element(const Matrix& matrix, size_t i) {
  return matrix.type == TYPE_BF16 ? widen(static_cast<const uint16_t*>(matrix.values)[i])
                                  : static_cast<const float*>(matrix.values)[i];
}

// `count` vectors of k values each, packed as f32 with k padded by zeros to whole lanes. `along_k`: k runs
// along memory.
std::vector<float> pack(const Matrix& matrix, int count, int k, int padded, bool along_k) {
  std::vector<float> packed(size_t(count) * size_t(padded) + LANES, 0.0f);
  for (int i = 0; i < count; i++) {
    float* to = &packed[size_t(i) * size_t(padded)];
    if (!along_k) {
      for (int j = 0; j < k; j++) to[j] = element(matrix, size_t(j) * size_t(matrix.ld) + size_t(i));
    } else if (matrix.type == TYPE_BF16) {
      const uint16_t* from = static_cast<const uint16_t*>(matrix.values) + size_t(i) * size_t(matrix.ld);
      for (int j = 0; j < k; j++) to[j] = widen(from[j]);
    } else {
      memcpy(to, static_cast<const float*>(matrix.values) + size_t(i) * size_t(matrix.ld), size_t(k) * 4);
    }
  }
  return packed;
}

Lanes load(const float* from) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}
float sum(Lanes lanes) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += lanes[i];
  return total;
}

// Dot products of one vector with four.
void dot4(const float* a, const float* const* b, int padded, float* out) {
  Lanes s0{}, s1{}, s2{}, s3{};
  for (int j = 0; j < padded; j += LANES) {
    Lanes x = load(a + j);
    s0 += x * load(b[0] + j);
    s1 += x * load(b[1] + j);
    s2 += x * load(b[2] + j);
    s3 += x * load(b[3] + j);
  }
  out[0] = sum(s0), out[1] = sum(s1), out[2] = sum(s2), out[3] = sum(s3);
}

}  // namespace

void multiply(const Product& p) {
  int padded = (p.k + LANES - 1) / LANES * LANES;
  std::vector<float> a = pack(p.a, p.m, p.k, padded, p.a.transposed);
  std::vector<float> b = pack(p.b, p.n, p.k, padded, !p.b.transposed);
  for (int i = 0; i < p.m; i++) {
    for (int j = 0; j < p.n; j += 4) {
      const float* columns[4];
      for (int t = 0; t < 4; t++) columns[t] = &b[size_t(j + t < p.n ? j + t : j) * size_t(padded)];
      float dots[4];
      dot4(&a[size_t(i) * size_t(padded)], columns, padded, dots);
      for (int t = 0; t < 4 && j + t < p.n; t++) {
        size_t at = size_t(j + t) * size_t(p.c_ld) + size_t(i);
        // With beta 0 the old value is not read: it may be NaN.
        if (p.c_type == TYPE_BF16) {
          uint16_t* c = static_cast<uint16_t*>(p.c) + at;
          *c = narrow(p.alpha * dots[t] + (p.beta != 0 ? p.beta * widen(*c) : 0));
        } else {
          float* c = static_cast<float*>(p.c) + at;
          *c = p.alpha * dots[t] + (p.beta != 0 ? p.beta * *c : 0);
        }
      }
    }
  }
}

}  // namespace emu
