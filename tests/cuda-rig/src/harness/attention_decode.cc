// Split-KV attention of one query a sequence.
#include "attention_scene.h"

using namespace harness;

namespace {

struct DecodeBatch : SceneBatch {
  DecodeBatch(const Scene& scene, const std::vector<SpanOf>& spans) : SceneBatch(scene, spans) {
    // The kernel takes the length of the sequence, its query included; 0 is padding.
    for (size_t s = 0; s < spans.size(); s++) lens[s] = spans[s].count ? spans[s].first + 1 : 0;
  }
};

void attend(Run& run, const Scene& scene, DecodeBatch& batch, int splits) {
  const Heads& heads = scene.heads;
  unsigned spans = unsigned(batch.spans.size()), group_blocks = unsigned(heads.group() + 3) / 4;
  Buffer<float> partial(spans * size_t(heads.q) * splits * (heads.d + 2));
  run.launch(("attend_split_d" + std::to_string(heads.d)).c_str(),
             {{spans, unsigned(heads.kv) * group_blocks, unsigned(splits)}, {128, 1, 1}, 0}, partial.data(),
             batch.qkv.data(), scene.cache.data(), batch.rows.data(), batch.lens.data(), batch.tables.data(),
             batch.table_starts.data(), scene.slopes_or_null(), heads.q, heads.kv, heads.window, heads.scale,
             splits);
  run.launch("attend_combine",
             {{spans, unsigned(heads.q), 1}, {unsigned(heads.d / 2 + 31) / 32 * 32, 1, 1}, 0},
             batch.out.data(), partial.data(), batch.rows.data(), heads.q, heads.d, splits);
}

// Sequences of 1 to 150 tokens, one of them padding; each asks for its last token.
void last_tokens(Run& run, int d) {
  Heads heads = random_heads(run.random, d);
  std::vector<int> lengths, oldest;
  std::vector<SpanOf> spans;
  for (int s = 0, count = run.random.between(1, 3); s < count; s++) {
    lengths.push_back(run.random.between(1, run.random.coin() ? 40 : 150));
    oldest.push_back(lengths.back() - 1);
    spans.push_back({s, lengths.back() - 1, 1});
  }
  spans.insert(spans.begin() + run.random.between(0, int(spans.size())), SpanOf{0, 0, 0});
  Scene scene(run.random, heads, lengths, oldest);
  DecodeBatch batch(scene, spans);
  attend(run, scene, batch, run.random.between(1, 8));
  compare_with_twin(run, scene, batch, false);
  for (size_t s = 0; s < spans.size(); s++)
    for (int i = 0; spans[s].count == 0 && i < heads.q * heads.d; i++)
      run.check(number(batch.out[size_t(batch.rows[s]) * heads.q * heads.d + i]) == 0,
                "a padding row is not zero");
}

}  // namespace

CASE(decode_attention_of_width_16_matches_its_twin) { last_tokens(run, 16); }
CASE(decode_attention_of_width_32_matches_its_twin) { last_tokens(run, 32); }
CASE(decode_attention_of_width_64_matches_its_twin) { last_tokens(run, 64); }
CASE(decode_attention_of_width_80_matches_its_twin) { last_tokens(run, 80); }
CASE(decode_attention_of_width_96_matches_its_twin) { last_tokens(run, 96); }
CASE(decode_attention_of_width_112_matches_its_twin) { last_tokens(run, 112); }
CASE(decode_attention_of_width_128_matches_its_twin) { last_tokens(run, 128); }
CASE(decode_attention_of_width_256_matches_its_twin) { last_tokens(run, 256); }

// A span's partial softmaxes, and so its result, do not depend on its neighbours in the batch.
CASE(decode_attention_of_a_sequence_does_not_depend_on_its_batch) {
  Heads heads = random_heads(run.random, 64);
  std::vector<int> lengths = {run.random.between(1, 90), run.random.between(1, 90)};
  Scene scene(run.random, heads, lengths, {lengths[0] - 1, lengths[1] - 1});
  std::vector<SpanOf> spans = {{0, lengths[0] - 1, 1}, {1, lengths[1] - 1, 1}};
  int splits = run.random.between(1, 8);
  DecodeBatch both(scene, spans);
  attend(run, scene, both, splits);
  for (size_t s = 0; s < 2; s++) {
    DecodeBatch alone(scene, {spans[s]});
    attend(run, scene, alone, splits);
    size_t row = size_t(heads.q) * heads.d;
    for (size_t i = 0; i < row; i++)
      run.check(
          alone.out[size_t(alone.rows[0]) * row + i].bits == both.out[size_t(both.rows[s]) * row + i].bits,
          "sequence %zu, number %zu differs", s, i);
  }
}
