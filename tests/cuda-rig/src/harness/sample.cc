// Cases of sample.cu. The twin is the host's sampler (engine::sampler) written down once more, sorting whole
// rows: tokens must be equal, not near.
#include <algorithm>

#include "harness.h"

namespace {

constexpr unsigned NO_TOKEN = 0xffffffffu;

float twin_exp(float x) {
  float clamped = x > -87.0f ? x : -87.0f, rounded = clamped * 1.44269504f + 12582912.0f,
        whole = rounded - 12582912.0f;
  float r = (clamped - whole * 0.6933594f) - whole * -2.1219444e-4f, p = 1.9875691e-4f;
  for (float c : {1.3982e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f}) p = p * r + c;
  return x < -87.0f ? 0.0f : (p * r * r + r + 1.0f) * std::ldexp(1.0f, int(whole));
}

struct Twin {
  std::vector<float> row;
  float max = 0, scale = 0;

  double weight(float x) const { return twin_exp((x - max) * scale); }

  double sum_of(size_t first, size_t count) const {
    double chains[8] = {}, sum = 0;
    for (size_t i = 0; i < count && first + i < row.size(); i++) chains[i % 8] += weight(row[first + i]);
    for (double chain : chains) sum += chain;
    return sum;
  }

  unsigned draw_from(const std::vector<unsigned>& ids, double left) const {
    for (unsigned id : ids) {
      if (left < weight(row[id])) return id;
      left -= weight(row[id]);
    }
    return NO_TOKEN;
  }

  unsigned draw_from_row(double u) const {
    std::vector<double> sums;
    for (size_t at = 0; at < row.size(); at += 256) sums.push_back(sum_of(at, 256));
    double left = 0;
    for (double sum : sums) left += sum;
    left *= u;
    for (size_t run = 0; run < sums.size(); run++) {
      if (left < sums[run]) {
        std::vector<unsigned> ids;
        for (unsigned id = run * 256; id < run * 256 + 256 && id < row.size(); id++) ids.push_back(id);
        return draw_from(ids, left);
      }
      left -= sums[run];
    }
    return NO_TOKEN;
  }

  unsigned sample(const Draw& draw) {
    for (float x : row)
      if (!std::isfinite(x)) return NO_TOKEN;
    std::vector<unsigned> ids;
    for (unsigned id = 0; id < row.size(); id++) ids.push_back(id);
    auto falling = [&](unsigned a, unsigned b) { return row[a] != row[b] ? row[a] > row[b] : a < b; };
    unsigned best = *std::min_element(ids.begin(), ids.end(), falling);
    if (draw.temperature == 0) return best;
    max = row[best], scale = std::fmin(1.0f / draw.temperature, 1e30f);
    unsigned id;
    if (draw.top_k == 0 && draw.top_p >= 1 && draw.min_p <= 0) {
      id = draw_from_row(draw.u);
    } else {
      auto sum = [&] {
        double all = 0;
        for (unsigned one : ids) all += weight(row[one]);
        return all;
      };
      if (draw.top_k > 0 || draw.top_p < 1) std::sort(ids.begin(), ids.end(), falling);
      if (draw.top_k > 0 && size_t(draw.top_k) < ids.size()) ids.resize(draw.top_k);
      if (draw.top_p < 1) {
        double share = double(draw.top_p) * (draw.top_k > 0 ? sum() : sum_of(0, row.size())), running = 0;
        for (size_t i = 0; i < ids.size(); i++) {
          running += weight(row[ids[i]]);
          if (running >= share) ids.resize(i + 1);
        }
      }
      if (draw.min_p > 0) {
        auto dropped = [&](unsigned one) { return weight(row[one]) < draw.min_p; };
        ids.erase(std::remove_if(ids.begin(), ids.end(), dropped), ids.end());
      }
      id = draw_from(ids, draw.u * sum());
    }
    return id == NO_TOKEN ? best : id;
  }
};

enum class Kind { Normal, Ties, Flat, Rounded, Outlier, KINDS };

void fill_row(harness::Random& random, float* row, int vocab) {
  Kind kind = Kind(random.between(0, int(Kind::KINDS) - 1));
  float spread = random.uniform(0.1f, 12);
  for (int i = 0; i < vocab; i++) {
    float x = spread * random.normal();
    row[i] = kind == Kind::Ties      ? std::floor(2 * random.normal()) * (random.coin() ? 1 : -1)
             : kind == Kind::Flat    ? 0.25f
             : kind == Kind::Rounded ? float(bf16(x))
                                     : x;
  }
  if (kind == Kind::Ties) row[random.between(0, vocab - 1)] = -0.0f;
  if (kind == Kind::Outlier) row[random.between(0, vocab - 1)] = random.coin() ? -1e30f : 40.0f;
}

Draw any_draw(harness::Random& random, int rows, int vocab) {
  const float temperatures[] = {0, 0.3f, 0.7f, 1, 2, 50, 1e-9f, 1e-41f};
  const int top_ks[] = {0, 0, 1, 5, 40, 300, vocab, vocab + 5, 4500};
  const float top_ps[] = {1, 1, 0.9f, 0.5f, 0.999f, 0.9999999f, 1e-9f, 1.5f};
  const float min_ps[] = {0, 0, 0.05f, 0.5f, 1, 1e-40f};
  Draw draw;
  draw.row = random.between(0, rows - 1);
  draw.temperature = random.one_of(temperatures);
  draw.top_k = random.one_of(top_ks), draw.top_p = random.one_of(top_ps), draw.min_p = random.one_of(min_ps);
  draw.u =
      random.between(0, 9) ? double(random.next() >> 11) / double(1ull << 53) : 1 - 1.0 / double(1ull << 53);
  return draw;
}

void samples_as_the_host(Run& run, int vocab, int threads, int draws_count) {
  int rows = 2;
  Buffer<float> logits(rows * vocab);
  for (int row = 0; row < rows; row++) fill_row(run.random, logits.data() + row * vocab, vocab);
  if (run.random.between(0, 15) == 0)
    logits[run.random.between(0, vocab - 1)] = run.random.coin() ? NAN : -INFINITY;
  Buffer<Draw> draws(draws_count);
  Buffer<unsigned> out(draws_count);
  for (Draw& draw : draws) draw = any_draw(run.random, rows, vocab);
  run.launch("sample_rows", {{unsigned(draws_count), 1, 1}, {unsigned(threads), 1, 1}}, out.data(),
             logits.data(), draws.data(), vocab);
  for (int i = 0; i < draws_count; i++) {
    const float* row = logits.data() + draws[i].row * vocab;
    Twin twin{std::vector<float>(row, row + vocab)};
    unsigned want = twin.sample(draws[i]);
    const Draw& draw = draws[i];
    run.check(out[i] == want,
              "vocab %d, temperature %g, top_k %d, top_p %.9g, min_p %g, u %.17g: token %u, the host's is %u",
              vocab, draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.u, out[i], want);
  }
}

}  // namespace

CASE(a_draw_is_the_host_samplers) {
  const int widths[] = {32, 64, 256};
  samples_as_the_host(run, run.random.between(1, 1500), run.random.one_of(widths), 6);
}

CASE(a_draw_is_the_host_samplers_where_more_tokens_survive_than_a_slice_holds) {
  samples_as_the_host(run, run.random.between(4000, 20000), 256, 2);
}

CASE(a_draw_of_a_whole_block_is_the_host_samplers) {
  samples_as_the_host(run, run.random.between(900, 3000), 1024, 1);
}

CASE(a_share_or_a_draw_that_meets_a_running_sum_exactly_falls_as_on_the_host) {
  // Of equal weights every share k / vocab and every draw j / vocab falls on a running sum.
  int vocab = 1 << run.random.between(1, 9), keeps = run.random.between(1, vocab - 1);
  int at = run.random.between(0, vocab - 1);
  double of_all = double(at) / vocab;
  Buffer<float> logits(vocab);
  for (float& x : logits) x = -3;
  Buffer<Draw> draws({Draw{0, 1, 0, float(keeps) / float(vocab), 0, 1 - 1.0 / double(1ull << 53)},
                      Draw{0, 1, 0, 1, 0.5f, of_all}, Draw{0, 1, vocab, 1, 0, of_all},
                      Draw{0, 1, 0, 1, 0, of_all}});
  Buffer<unsigned> out(4);
  run.launch("sample_rows", {{4, 1, 1}, {64, 1, 1}}, out.data(), logits.data(), draws.data(), vocab);
  run.equal("out", out, [&](size_t i) { return i == 0 ? keeps - 1 : at; });
}

CASE(a_share_that_hangs_on_the_order_of_additions_is_cut_as_on_the_host) {
  // Eight tokens of weight 1, and hundreds so light that one is lost when it is added to those but not when
  // they are added among themselves. The host's chains hold one heavy token each (all light ones are lost),
  // or one holds all heavy ones.
  int vocab = run.random.between(200, 600), keeps = run.random.between(1, 7),
      apart = run.random.coin() ? 1 : 8;
  Buffer<float> logits(vocab);
  for (float& x : logits) x = -37.5f;
  for (int i = 0; i < 8; i++) logits[i * apart] = 0;
  Buffer<Draw> draws({Draw{0, 1, 0, keeps / 8.0f, 0, 1 - 1.0 / double(1ull << 53)}});
  Buffer<unsigned> out(1);
  run.launch("sample_rows", {{1, 1, 1}, {64, 1, 1}}, out.data(), logits.data(), draws.data(), vocab);
  Twin twin{std::vector<float>(logits.begin(), logits.end())};
  unsigned want = twin.sample(draws[0]), expected = apart == 1 ? keeps - 1 : 8 * keeps;
  run.check(want == expected, "the twin says %u, not %u", want, expected);
  run.equal("out", out, [&](size_t) { return want; });
}
