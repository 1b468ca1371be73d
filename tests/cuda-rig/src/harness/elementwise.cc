// Cases of elementwise.cu.
#include "harness.h"

namespace {

// Any number of blocks is right: the kernels walk what the grid does not cover.
rig::Launch any_grid(harness::Random& random) {
  return {{unsigned(random.between(1, 3)), 1, 1}, {256, 1, 1}};
}

rig::Launch any_pieces(harness::Random& random, int rows) {
  return {{unsigned(rows), unsigned(random.between(1, 3)), 1}, {256, 1, 1}};
}

void fill(Buffer<float>& values, harness::Random& random, float spread = 1) {
  for (float& value : values) value = spread * random.normal();
}

std::vector<float> copy_of(const Buffer<float>& values) {
  return std::vector<float>(values.data(), values.data() + values.size());
}

}  // namespace

CASE(add_adds_every_number) {
  long long n = run.random.between(1, 5000);
  Buffer<float> x(n), y(n);
  fill(x, run.random), fill(y, run.random);
  std::vector<float> before = copy_of(x);
  run.launch("add", any_grid(run.random), x.data(), y.data(), n);
  run.equal("x", x, [&](size_t i) { return before[i] + y[i]; });
}

CASE(clamp_and_scale_change_every_number_and_a_factor_of_zero_clears_what_is_not_finite) {
  long long n = run.random.between(1, 5000);
  Buffer<float> x(n);
  fill(x, run.random, 5);
  std::vector<float> before = copy_of(x);
  run.launch("clamp", any_grid(run.random), x.data(), n, 2.5f);
  run.equal("clamped", x, [&](size_t i) { return std::fmin(std::fmax(before[i], -2.5f), 2.5f); });
  before = copy_of(x);
  run.launch("scale", any_grid(run.random), x.data(), n, 0.3f);
  run.equal("scaled", x, [&](size_t i) { return before[i] * 0.3f; });
  for (size_t i = 0; i < x.size(); i += 3) x[i] = i % 2 ? INFINITY : NAN;
  run.launch("scale", any_grid(run.random), x.data(), n, 0.0f);
  run.equal("cleared", x, [](size_t) { return 0; });
}

CASE(gelu_is_the_form_with_erf) {
  long long n = run.random.between(1, 3000);
  Buffer<float> x(n);
  fill(x, run.random, 4);
  std::vector<float> before = copy_of(x);
  run.launch("gelu", any_grid(run.random), x.data(), n);
  run.close(
      "x", x, [&](size_t i) { return 0.5 * before[i] * (1 + std::erf(before[i] / std::sqrt(2.0))); }, 1e-5);
}

CASE(numbers_are_rounded_to_the_nearest_even_bf16) {
  long long n = run.random.between(1, 5000);
  Buffer<float> x(n);
  Buffer<bf16> half(n);
  fill(x, run.random, 100);
  if (n > 1) x[0] = 1.00390625f, x[1] = 1.01171875f;  // halfway: to 1.0 and 1.015625, whose last bits are 0
  run.launch("to_bf16", any_grid(run.random), half.data(), x.data(), n);
  run.equal("half", half, [&](size_t i) { return n > 1 && i < 2 ? bf16(i ? 1.015625f : 1.0f) : bf16(x[i]); });
}

CASE(silu_mul_and_add_bias_match_their_twins_for_any_width) {
  int rows = run.random.between(1, 4), width = run.random.between(1, 1500);
  Buffer<float> gate_up(2 * rows * width), x(rows * width), bias(width);
  Buffer<bf16> out(rows * width);
  fill(gate_up, run.random, 5), fill(x, run.random), fill(bias, run.random);
  gate_up[0] = -200, gate_up[width] = 1;  // the exponential overflows; the product is 0
  run.launch("silu_mul", any_pieces(run.random, rows), out.data(), gate_up.data(), rows, width);
  run.close(
      "out", out,
      [&](size_t i) {
        double gate = gate_up[i / width * 2 * width + i % width],
               up = gate_up[i / width * 2 * width + width + i % width];
        return gate / (1 + std::exp(-gate)) * up;
      },
      5e-3, 1e-3);
  std::vector<float> before = copy_of(x);
  run.launch("add_bias", any_pieces(run.random, rows), x.data(), bias.data(), rows, width);
  run.equal("x", x, [&](size_t i) { return before[i] + bias[i % width]; });
}
