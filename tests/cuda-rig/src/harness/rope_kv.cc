// Cases of rope_kv.cu.
#include <set>

#include "harness.h"

CASE(rope_rotates_q_and_k_and_writes_k_and_v_to_their_places_alone) {
  const int widths[] = {2, 6, 16, 32, 64, 80, 96, 112, 128, 256};
  int rows = run.random.between(1, 6), kv_heads = run.random.between(1, 3),
      q_heads = kv_heads * run.random.between(1, 4);
  int d = run.random.one_of(widths), half = d / 2, heads = q_heads + 2 * kv_heads, blocks = 4;
  bool turns = run.random.between(0, 3) > 0;
  Buffer<float> qkv(rows * heads * d), cos_sin(rows * d);
  Buffer<bf16> kv(blocks * 2 * kv_heads * 16 * d);
  Buffer<int> slots(rows);
  for (float& value : qkv) value = run.random.normal();
  for (int row = 0; row < rows; row++) {
    for (int i = 0; i < half; i++) {
      float angle = 6 * run.random.uniform();
      cos_sin[row * d + i] = std::cos(angle), cos_sin[row * d + half + i] = std::sin(angle);
    }
  }
  std::set<int> taken;
  for (int& slot : slots) {
    slot = run.random.between(-1, blocks * 16 - 1);
    if (slot >= 0 && !taken.insert(slot).second) slot = -1;
  }
  const std::vector<float> before(qkv.begin(), qkv.end());
  // Number i of a head as it must be after the turn.
  auto turned = [&](int row, int head, int i) {
    const float* x = &before[(size_t(row) * heads + head) * d];
    if (!turns || slots[row] < 0 || head >= q_heads + kv_heads) return double(x[i]);
    int at = i % half;
    double c = cos_sin[row * d + at], s = cos_sin[row * d + half + at];
    return i < half ? x[at] * c - x[half + at] * s : x[half + at] * c + x[at] * s;
  };
  run.launch("rope_write_kv", {{unsigned(rows), unsigned(heads + 7) / 8, 1}, {256, 1, 1}}, qkv.data(),
             kv.data(), turns ? cos_sin.data() : nullptr, slots.data(), q_heads, kv_heads, d);
  run.close("qkv", qkv, [&](size_t i) { return turned(i / d / heads, i / d % heads, i % d); }, 1e-5);
  for (int place = 0; place < blocks * 16; place++) {
    int row = rows - 1;
    while (row >= 0 && slots[row] != place) row--;
    for (int side = 0; side < 2; side++) {
      for (int head = 0; head < kv_heads; head++) {
        const bf16* got = &kv[(((size_t(place / 16) * 2 + side) * kv_heads + head) * 16 + place % 16) * d];
        for (int i = 0; i < d; i++) {
          if (row < 0) {
            run.check(got[i].bits == 0xffff, "place %d, side %d, head %d was written by no row's", place,
                      side, head);
          } else {
            double want = turned(row, q_heads + side * kv_heads + head, i);
            run.check(std::fabs(float(got[i]) - want) <= 4.1e-3 * (std::fabs(want) + 1e-3),
                      "place %d, side %d, head %d, number %d is %g, expected %g", place, side, head, i,
                      float(got[i]), want);
          }
        }
      }
    }
  }
}
