// One case for each planted kernel and for the right one beside it. The Rust tests say which must fail, in
// which build, and with which words.
#include "harness.h"

namespace {

using rig::Launch;

Launch one_block(unsigned threads, size_t shared = 0) { return {{1, 1, 1}, {threads, 1, 1}, shared}; }

void fill(harness::Random& random, Buffer<float>& values) {
  for (float& value : values) value = random.uniform();
}
void fill(harness::Random& random, Buffer<bf16>& values) {
  for (bf16& value : values) value = bf16(random.uniform());
}

void sums(Run& run, const char* kernel) {
  int n = run.random.between(1, 900);
  Buffer<float> x(n), out(1);
  fill(run.random, x);
  run.launch(kernel, one_block(unsigned(run.random.between(2, 8)) * 32), out.data(), x.data(), n);
  double sum = 0;
  for (float value : x) sum += value;
  run.close("sum", out, [&](size_t) { return sum; }, 1e-4, 1);
}

void rotates(Run& run, const char* kernel) {
  Buffer<float> x(32), out(32);
  fill(run.random, x);
  run.launch(kernel, one_block(32), out.data(), x.data());
  run.equal("out", out, [&](size_t i) { return x[(i + 1) % 32]; });
}

// b is [8][16], or [16][8] if transposed.
void multiplies(Run& run, const char* kernel, unsigned threads, bool transposed) {
  Buffer<bf16> a(16 * 16), b(16 * 8);
  Buffer<float> c(16 * 8);
  fill(run.random, a);
  fill(run.random, b);
  run.launch(kernel, one_block(threads, 2 * 16 * 16 * sizeof(bf16)), c.data(), a.data(), b.data());
  run.close(
      "c", c,
      [&](size_t i) {
        double sum = 0;
        for (size_t k = 0; k < 16; k++)
          sum += double(float(a[i / 8 * 16 + k])) *
                 double(float(b[transposed ? k * 8 + i % 8 : i % 8 * 16 + k]));
        return sum;
      },
      1e-5, 1);
}

}  // namespace

CASE(right_block_sum) { sums(run, "block_sum"); }
CASE(missing_barrier) { sums(run, "block_sum_without_barrier"); }
CASE(right_rotation) { rotates(run, "rotate_in_a_warp"); }
CASE(missing_syncwarp) { rotates(run, "rotate_without_syncwarp"); }

CASE(wrong_mask) {
  Buffer<float> x(32), out(1);
  fill(run.random, x);
  run.launch("warp_sum_with_wrong_mask", one_block(32), out.data(), x.data());
}
CASE(divergent_barrier) {
  Buffer<float> x(64), out(64);
  fill(run.random, x);
  run.launch("barrier_in_a_branch", one_block(64), out.data(), x.data());
}

CASE(out_of_bounds) {
  // A length whose last value ends at the guard page.
  int n = run.random.between(1, 50) * 4;
  Buffer<float> x(n), out(n);
  fill(run.random, x);
  run.launch("copy_one_too_many", one_block(64), out.data(), x.data(), n);
}
CASE(one_past_an_odd_end) {
  // One value short of the guard page: only an address checker sees it.
  int n = run.random.between(1, 50) * 4 + 1;
  Buffer<float> x(n), out(n);
  fill(run.random, x);
  run.launch("copy_one_too_many", one_block(64), out.data(), x.data(), n);
}
CASE(out_of_static_shared) {
  Buffer<float> x(32), out(16);
  fill(run.random, x);
  run.launch("shared_one_too_many", one_block(64), out.data(), x.data(), 32);
}
CASE(out_of_dynamic_shared) {
  Buffer<float> x(160), out(160);
  fill(run.random, x);
  run.launch("dynamic_shared_too_many", one_block(64, 128 * sizeof(float)), out.data(), x.data(), 160);
}
CASE(misaligned) {
  int width = run.random.between(1, 9) * 4 + run.random.between(1, 3);
  Buffer<float> x(size_t(32) * size_t(width)), out(32);
  fill(run.random, x);
  run.launch("misaligned_load", one_block(32), out.data(), x.data(), width);
}

CASE(right_tile) { multiplies(run, "tile_by_mma", 64, false); }
CASE(right_transposed_tile) { multiplies(run, "tile_by_transposed_load", 32, true); }
CASE(missing_wait) { multiplies(run, "tile_without_wait", 64, false); }
CASE(missing_commit) { multiplies(run, "tile_without_commit", 64, false); }
CASE(copies_without_barrier) { multiplies(run, "tile_without_barrier", 64, false); }

CASE(wrong_argument_type) {
  Buffer<float> x(8), out(1);
  fill(run.random, x);
  run.launch("block_sum", one_block(32), out.data(), x.data(), 8LL);
}
CASE(too_many_threads) {
  Buffer<float> x(32), out(1);
  fill(run.random, x);
  run.launch("warp_sum_with_wrong_mask", one_block(64), out.data(), x.data());
}
