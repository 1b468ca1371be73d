// Cases of norm.cu.
#include "harness.h"

namespace {

// Threads as the launcher chooses them: a vector of four each, whole warps.
unsigned threads_for(int width) {
  unsigned warps = (width / 4 + 31) / 32;
  return 32 * (warps < 1 ? 1 : warps > 32 ? 32 : warps);
}

int any_width(harness::Random& random) {
  int width = random.between(1, 700);
  return random.coin() ? 4 * width : width;
}

struct Moments {
  double mean, square, variance;
};

Moments moments(const Buffer<float>& x, size_t row, int width) {
  double sum = 0, squares = 0, around = 0;
  for (int i = 0; i < width; i++)
    sum += x[row * width + i], squares += double(x[row * width + i]) * x[row * width + i];
  for (int i = 0; i < width; i++) around += std::pow(x[row * width + i] - sum / width, 2);
  return {sum / width, squares / width, around / width};
}

}  // namespace

CASE(rms_norm_matches_its_twin) {
  int rows = run.random.between(1, 4), width = any_width(run.random);
  float eps = 1e-5f;
  Buffer<float> x(rows * width), weight(width);
  Buffer<bf16> out(rows * width);
  for (float& value : x) value = run.random.normal();
  for (float& value : weight) value = run.random.normal();
  run.launch("rms_norm", {{unsigned(rows), 1, 1}, {threads_for(width), 1, 1}}, out.data(), x.data(),
             weight.data(), width, eps);
  run.close(
      "out", out,
      [&](size_t i) {
        return x[i] / std::sqrt(moments(x, i / width, width).square + eps) * weight[i % width];
      },
      5e-3);
}

CASE(layer_norm_matches_its_twin_with_a_mean_far_from_zero_and_with_or_without_bias) {
  int rows = run.random.between(1, 4), width = any_width(run.random);
  float eps = 1e-5f, shift = run.random.coin() ? 0.0f : 300.0f;
  bool biased = run.random.coin();
  Buffer<float> x(rows * width), weight(width), bias(width);
  Buffer<bf16> out(rows * width);
  for (float& value : x) value = run.random.normal() + shift;
  for (float& value : weight) value = run.random.normal();
  for (float& value : bias) value = run.random.normal();
  run.launch("layer_norm", {{unsigned(rows), 1, 1}, {threads_for(width), 1, 1}}, out.data(), x.data(),
             weight.data(), biased ? bias.data() : nullptr, width, eps);
  run.close(
      "out", out,
      [&](size_t i) {
        Moments of = moments(x, i / width, width);
        double b = biased ? bias[i % width] : 0;
        return (x[i] - of.mean) / std::sqrt(of.variance + eps) * weight[i % width] + b;
      },
      5e-3, 0.3);
}

CASE(a_norm_of_a_row_does_not_depend_on_the_other_rows) {
  int width = any_width(run.random);
  Buffer<float> x(3 * width), weight(width);
  Buffer<bf16> together(3 * width), alone(width);
  for (float& value : x) value = run.random.normal();
  for (float& value : weight) value = 1;
  unsigned threads = threads_for(width);
  run.launch("rms_norm", {{3, 1, 1}, {threads, 1, 1}}, together.data(), x.data(), weight.data(), width,
             1e-5f);
  Buffer<float> last(width);
  for (int i = 0; i < width; i++) last[i] = x[2 * width + i];
  run.launch("rms_norm", {{1, 1, 1}, {threads, 1, 1}}, alone.data(), last.data(), weight.data(), width,
             1e-5f);
  run.equal("alone", alone, [&](size_t i) { return harness::number(together[2 * width + i]); });
}
