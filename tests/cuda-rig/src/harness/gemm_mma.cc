// Products on tensor cores that add over k in one order, of bf16 and quantised weights.
#include <algorithm>

#include "harness.h"

using namespace harness;

namespace {

constexpr unsigned TILE = 64;
constexpr size_t TILE_BYTES = 64 * 72 * 2;
constexpr size_t STAGES = 4;

struct Shape {
  int rows, n, k;
};

// Mostly ragged; a third with k a multiple of 8, where x is copied 16 bytes at a time.
Shape random_shape(Random& random) {
  Shape shape{random.between(1, random.coin() ? 9 : 140), random.between(1, 140), random.between(1, 330)};
  if (random.between(0, 2) == 0) shape.k = random.between(1, 40) * 8;
  return shape;
}

rig::Launch launch_of(const Shape& shape, size_t stage_bytes, size_t more_bytes) {
  unsigned tiles_rows = (unsigned(shape.rows) + TILE - 1) / TILE,
           tiles_n = (unsigned(shape.n) + TILE - 1) / TILE;
  return {{tiles_rows, tiles_n, 1}, {128, 1, 1}, STAGES * (TILE_BYTES + stage_bytes) + more_bytes};
}

// Activations, their rows `ld` numbers apart with poison between, and a bias or none.
struct Inputs {
  Inputs(Random& random, const Shape& shape)
      : ld(shape.k + (random.coin() ? 0 : random.between(1, 9))),
        x(size_t(shape.rows) * ld),
        bias(size_t(shape.n)),
        with_bias(random.coin()) {
    for (int row = 0; row < shape.rows; row++)
      for (int j = 0; j < shape.k; j++) x[size_t(row) * ld + j] = bf16(random.normal());
    for (float& value : bias) value = random.normal();
  }

  const float* bias_or_null() const { return with_bias ? bias.data() : nullptr; }

  const int ld;
  Buffer<bf16> x;
  Buffer<float> bias;
  const bool with_bias;
};

// Weights as plain numbers [n][k], rounded to bf16 as the tensor cores take them.
using Weights = std::vector<float>;

void compare_with_twin(Run& run, const Shape& shape, const Inputs& in, const Weights& w,
                       const Buffer<float>& out) {
  run.close(
      "out", out,
      [&](size_t at) {
        size_t row = at / size_t(shape.n), i = at % size_t(shape.n);
        double sum = in.with_bias ? double(in.bias[i]) : 0;
        for (int j = 0; j < shape.k; j++)
          sum += number(in.x[row * size_t(in.ld) + j]) * w[i * size_t(shape.k) + j];
        return sum;
      },
      1e-4, std::sqrt(double(shape.k)));
}

// bf16 weights, rows `ld` numbers apart with poison between.
struct Dense {
  Dense(const Shape& shape, const Weights& w) : ld((shape.k + 7) / 8 * 8), packed(size_t(shape.n) * ld) {
    for (int i = 0; i < shape.n; i++)
      for (int j = 0; j < shape.k; j++) packed[size_t(i) * ld + j] = bf16(w[size_t(i) * shape.k + j]);
  }
  const int ld;
  Buffer<bf16> packed;
};

void multiply(Run& run, const Shape& shape, Inputs& in, Dense& w, Buffer<float>& out, int first_row = 0) {
  run.launch("gemm_bf16", launch_of(shape, TILE_BYTES, 0), out.data(),
             in.x.data() + size_t(first_row) * in.ld, w.packed.data(), in.bias_or_null(), shape.rows, shape.n,
             shape.k, in.ld, w.ld);
}

Weights random_weights(Random& random, const Shape& shape) {
  Weights w(size_t(shape.n) * shape.k);
  for (float& value : w) value = float(bf16(random.normal()));
  return w;
}

// One matrix in the quantised form: a slice of columns that may begin inside a group.
struct Quantised {
  Quantised(Random& random, const Shape& shape, int bits)
      : bits(bits),
        group(32 << random.between(0, 2)),
        lead(random.coin() ? 0 : random.between(0, group - 1)),
        groups((lead + shape.k - 1) / group + 1),
        ld(((shape.k * bits + 7) / 8 + 15) / 16 * 16),
        q(size_t(shape.n) * ld),
        scales(size_t(shape.n) * groups),
        zeros(size_t(shape.n) * groups),
        with_zeros(bits == 4 && random.coin()),
        plain(size_t(shape.n) * shape.k) {
    for (float& scale : scales) scale = random.uniform(0.001f, 0.2f);
    for (unsigned char& zero : zeros) zero = (unsigned char)(random.between(0, 15));
    for (int i = 0; i < shape.n; i++)
      for (int j = 0; j < shape.k; j++) {
        size_t of_group = size_t(i) * groups + size_t(lead + j) / group;
        unsigned char& byte = q[size_t(i) * ld + size_t(j) * bits / 8];
        int value = bits == 8 ? random.between(-127, 127) : random.between(0, 15);
        int zero = bits == 8 ? 0 : with_zeros ? zeros[of_group] : 8;
        if (bits == 8)
          byte = (unsigned char)(value);
        else
          byte = j % 2 ? (unsigned char)((byte & 0x0f) | value << 4) : (unsigned char)(0xf0 | value);
        plain[size_t(i) * shape.k + j] = float(bf16(scales[of_group] * float(value - zero)));
      }
  }
  const int bits, group, lead, groups, ld;
  Buffer<unsigned char> q;
  Buffer<float> scales;
  Buffer<unsigned char> zeros;
  const bool with_zeros;
  Weights plain;
};

void multiply(Run& run, const Shape& shape, Inputs& in, Quantised& w, Buffer<float>& out, int first_row = 0) {
  const bf16* x = in.x.data() + size_t(first_row) * in.ld;
  rig::Launch launch = launch_of(shape, TILE * TILE * size_t(w.bits) / 8, TILE_BYTES);
  if (w.bits == 8)
    run.launch("gemm_w8", launch, out.data(), x, reinterpret_cast<const signed char*>(w.q.data()),
               w.scales.data(), in.bias_or_null(), shape.rows, shape.n, shape.k, in.ld, w.ld, w.group,
               w.lead);
  else
    run.launch("gemm_w4", launch, out.data(), x, w.q.data(), w.scales.data(),
               w.with_zeros ? w.zeros.data() : nullptr, in.bias_or_null(), shape.rows, shape.n, shape.k,
               in.ld, w.ld, w.group, w.lead);
}

void matches_its_twin(Run& run, int bits) {
  Shape shape = random_shape(run.random);
  Inputs in(run.random, shape);
  Quantised w(run.random, shape, bits);
  Buffer<float> out(size_t(shape.rows) * shape.n), of_dense(size_t(shape.rows) * shape.n);
  multiply(run, shape, in, w, out);
  compare_with_twin(run, shape, in, w.plain, out);
  // The same numbers as bf16 give the same bits.
  Dense dense(shape, w.plain);
  multiply(run, shape, in, dense, of_dense);
  run.equal("out", out, [&](size_t i) { return of_dense[i]; });
}

// Each row alone has the bits it has among others. The activations' rows are 16-byte aligned or none is.
template <class W>
void rows_do_not_depend_on_their_number(Run& run, const Shape& shape, Inputs& in, W& w) {
  Buffer<float> all(size_t(shape.rows) * shape.n);
  multiply(run, shape, in, w, all);
  for (int first = 0; first < shape.rows;) {
    Shape part{std::min(shape.rows - first, run.random.between(1, 40)), shape.n, shape.k};
    Buffer<float> out(size_t(part.rows) * part.n);
    multiply(run, part, in, w, out, first);
    run.equal("out", out, [&](size_t i) { return all[size_t(first) * shape.n + i]; });
    first += part.rows;
  }
}

}  // namespace

CASE(product_of_bf16_weights_matches_its_twin) {
  Shape shape = random_shape(run.random);
  Inputs in(run.random, shape);
  Weights w = random_weights(run.random, shape);
  Dense dense(shape, w);
  Buffer<float> out(size_t(shape.rows) * shape.n);
  multiply(run, shape, in, dense, out);
  compare_with_twin(run, shape, in, w, out);
}
CASE(product_of_int8_weights_matches_its_twin_and_that_of_the_same_bf16) { matches_its_twin(run, 8); }
CASE(product_of_int4_weights_matches_its_twin_and_that_of_the_same_bf16) { matches_its_twin(run, 4); }

CASE(a_row_of_a_product_does_not_depend_on_how_many_there_are) {
  Shape shape = random_shape(run.random);
  Inputs in(run.random, shape);
  if (run.random.coin()) {
    Dense dense(shape, random_weights(run.random, shape));
    rows_do_not_depend_on_their_number(run, shape, in, dense);
  } else {
    Quantised quantised(run.random, shape, run.random.coin() ? 8 : 4);
    rows_do_not_depend_on_their_number(run, shape, in, quantised);
  }
}
