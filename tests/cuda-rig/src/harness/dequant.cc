// Cases of dequant.cu.
#include "quantised.h"

namespace {

void dequantises(Run& run, int bits) {
  int n = run.random.between(1, 4);
  harness::Quantised w(run.random, bits, n, harness::any_k(run.random));
  int ld = (w.k + 7) / 8 * 8;
  Buffer<bf16> out(n * ld);
  rig::Launch launch = {{unsigned(n), unsigned(run.random.between(1, 2)), 1}, {256, 1, 1}};
  if (bits == 8) {
    run.launch("dequant_w8", launch, out.data(), reinterpret_cast<signed char*>(w.q.data()), w.scales.data(),
               n, w.k, w.ldq, ld, w.group, w.lead);
  } else {
    run.launch("dequant_w4", launch, out.data(), w.q.data(), w.scales.data(),
               w.zeroed ? w.zeros.data() : nullptr, n, w.k, w.ldq, ld, w.group, w.lead);
  }
  run.equal("out", out, [&](size_t i) {
    int column = i % ld;
    return column < w.k ? harness::number(bf16(float(w.weight(i / ld, column)))) : 0.0;
  });
}

}  // namespace

CASE(dequantised_int8_is_the_rounded_weight_and_zero_in_the_padding) { dequantises(run, 8); }
CASE(dequantised_int4_is_the_rounded_weight_and_zero_in_the_padding) { dequantises(run, 4); }
