// Cases of gemv.cu.
#include "quantised.h"

namespace {

void multiplies(Run& run, int bits) {
  const int most[] = {1, 2, 4, 8};
  int rows_most = run.random.one_of(most), rows = run.random.between(1, rows_most),
      n = run.random.between(1, 70);
  harness::Quantised w(run.random, bits, n, harness::any_k(run.random));
  Buffer<bf16> x(rows * w.k);
  Buffer<float> out(rows * n), bias(n);
  for (bf16& value : x) value = bf16(run.random.normal());
  for (float& value : bias) value = run.random.normal();
  float* with = run.random.coin() ? bias.data() : nullptr;
  unsigned a_block = rows_most <= 2 ? 8 : 16;
  rig::Launch launch = {{(n + a_block - 1) / a_block, 1, 1}, {128, 1, 1}};
  std::string kernel = "gemv_w" + std::to_string(bits) + "_r" + std::to_string(rows_most);
  if (bits == 8) {
    run.launch(kernel.c_str(), launch, out.data(), x.data(), reinterpret_cast<signed char*>(w.q.data()),
               w.scales.data(), with, rows, n, w.k, w.ldq, w.group, w.lead);
  } else {
    run.launch(kernel.c_str(), launch, out.data(), x.data(), w.q.data(), w.scales.data(),
               w.zeroed ? w.zeros.data() : nullptr, with, rows, n, w.k, w.ldq, w.group, w.lead);
  }
  run.close(
      "out", out,
      [&](size_t i) {
        int row = i / n, of = i % n;
        double sum = with ? bias[of] : 0;
        for (int c = 0; c < w.k; c++) sum += harness::number(x[row * w.k + c]) * w.weight(of, c);
        return sum;
      },
      1e-4, bits == 8 ? 30 : 3);
}

}  // namespace

CASE(gemv_of_int8_matches_its_twin) { multiplies(run, 8); }
CASE(gemv_of_int4_matches_its_twin) { multiplies(run, 4); }
