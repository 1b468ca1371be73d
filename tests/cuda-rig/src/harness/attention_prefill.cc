// Attention of many queries a sequence, by tiles of 64.
#include "attention_scene.h"

using namespace harness;

namespace {

constexpr int TILE_QUERIES = 64;

// Dynamic shared memory, as the launcher computes it: K and V, two buffers each, rows padded by 8 numbers.
size_t shared_bytes(int d) { return size_t(2) * 2 * (d > 128 ? 32 : 64) * (d + 8) * 2; }

void attend(Run& run, const Scene& scene, SceneBatch& batch) {
  const Heads& heads = scene.heads;
  std::vector<int> tiles;
  for (size_t s = 0; s < batch.spans.size(); s++)
    for (int first = 0; first < std::max(1, batch.spans[s].count); first += TILE_QUERIES) {
      tiles.push_back(int(s));
      tiles.push_back(first);
    }
  Buffer<int> tile_buffer(tiles);
  run.launch(("attend_tile_d" + std::to_string(heads.d)).c_str(),
             {{unsigned(tiles.size() / 2), unsigned(heads.q), 1}, {128, 1, 1}, shared_bytes(heads.d)},
             batch.out.data(), batch.qkv.data(), scene.cache.data(), tile_buffer.data(), batch.rows.data(),
             batch.positions.data(), batch.lens.data(), batch.tables.data(), batch.table_starts.data(),
             scene.slopes_or_null(), heads.q, heads.kv, heads.window, heads.scale);
}

// Parts of up to two sequences, and a span without queries.
void spans(Run& run, int d) {
  Heads heads = random_heads(run.random, d);
  heads.q = heads.kv * std::min(heads.group(), 3);
  std::vector<int> lengths, oldest;
  std::vector<SpanOf> spans;
  for (int s = 0, count = run.random.between(1, 2); s < count; s++) {
    lengths.push_back(run.random.between(1, run.random.coin() ? 50 : 150));
    int first = run.random.coin() ? 0 : run.random.between(0, lengths.back() - 1);
    oldest.push_back(first);
    spans.push_back({s, first, run.random.between(1, lengths.back() - first)});
  }
  spans.insert(spans.begin() + run.random.between(0, int(spans.size())), SpanOf{0, 0, 0});
  Scene scene(run.random, heads, lengths, oldest);
  SceneBatch batch(scene, spans);
  attend(run, scene, batch);
  compare_with_twin(run, scene, batch, true);
  // Rows of no query stay as they were.
  size_t row = size_t(heads.q) * heads.d;
  for (size_t s = 0; s < spans.size(); s++)
    for (size_t i = 0; i < row; i++)
      run.check(batch.out[size_t(batch.rows[s] - 1) * row + i].bits == 0xffff,
                "the row before span %zu was written", s);
}

// One sequence whole, and in chunks of every size down to one: the bits of each row are the same.
void chunks(Run& run, int d) {
  Heads heads = random_heads(run.random, d);
  heads.q = heads.kv * std::min(heads.group(), 2);
  int length = run.random.between(1, 140);
  Scene scene(run.random, heads, {length}, {0});
  SceneBatch whole(scene, {{0, 0, length}});
  attend(run, scene, whole);
  std::vector<SpanOf> spans;
  for (int first = 0; first < length;) {
    int most = run.random.coin() ? 3 : 80;
    int count = std::min(length - first, run.random.between(1, most));
    spans.push_back({0, first, count});
    first += count;
  }
  SceneBatch cut(scene, spans);
  attend(run, scene, cut);
  size_t row = size_t(heads.q) * heads.d;
  for (size_t s = 0; s < spans.size(); s++)
    for (size_t i = 0; i < size_t(spans[s].count) * row; i++) {
      unsigned got = cut.out[size_t(cut.rows[s]) * row + i].bits;
      unsigned want = whole.out[size_t(whole.rows[0] + spans[s].first) * row + i].bits;
      run.check(got == want, "d %d, position %zu, number %zu: bits %04x in a chunk of %d, %04x in the whole",
                d, spans[s].first + i / row, i % row, got, spans[s].count, want);
    }
}

}  // namespace

CASE(prefill_attention_of_width_16_matches_its_twin) { spans(run, 16); }
CASE(prefill_attention_of_width_32_matches_its_twin) { spans(run, 32); }
CASE(prefill_attention_of_width_64_matches_its_twin) { spans(run, 64); }
CASE(prefill_attention_of_width_80_matches_its_twin) { spans(run, 80); }
CASE(prefill_attention_of_width_96_matches_its_twin) { spans(run, 96); }
CASE(prefill_attention_of_width_112_matches_its_twin) { spans(run, 112); }
CASE(prefill_attention_of_width_128_matches_its_twin) { spans(run, 128); }
CASE(prefill_attention_of_width_256_matches_its_twin) { spans(run, 256); }

CASE(prefill_attention_of_width_16_has_the_same_bits_in_any_chunks) { chunks(run, 16); }
CASE(prefill_attention_of_width_64_has_the_same_bits_in_any_chunks) { chunks(run, 64); }
CASE(prefill_attention_of_width_112_has_the_same_bits_in_any_chunks) { chunks(run, 112); }
CASE(prefill_attention_of_width_256_has_the_same_bits_in_any_chunks) { chunks(run, 256); }
