// Sequences in a paged cache, for the cases of both attention kernels, and attention itself in double
// precision.
//
// All that a kernel must not read is poison: slots past a sequence's end, blocks behind the window, the K and
// V columns of qkv, rows that belong to no span.
#pragma once

#include <algorithm>

#include "harness.h"

namespace harness {

constexpr int PAGE_TOKENS = 16;

// Heads of one model and what the formula takes beside them.
struct Heads {
  int d, q, kv, window;
  float scale;
  bool with_slopes;

  int group() const { return q / kv; }
  size_t qkv_width() const { return size_t(q + 2 * kv) * d; }
};

inline Heads random_heads(Random& random, int d) {
  static const int groups[] = {1, 2, 3, 4, 5, 7, 8};
  static const int windows[] = {0, 0, 0, 1, 5, 16, 17, 40, 70};
  Heads heads;
  heads.d = d;
  heads.kv = random.between(1, d > 64 ? 2 : 3);
  heads.q = heads.kv * random.one_of(groups);
  heads.window = random.one_of(windows);
  heads.scale = (random.coin() ? 1.0f : 4.0f) / std::sqrt(float(d));
  heads.with_slopes = random.coin();
  return heads;
}

// Queries `first .. first + count` of sequence `sequence`.
struct SpanOf {
  int sequence, first, count;
};

class Scene {
 public:
  // Sequences of these lengths; a window lets the blocks go that no query from `oldest_query` on sees.
  Scene(Random& random, const Heads& heads, const std::vector<int>& lengths,
        const std::vector<int>& oldest_query)
      : heads(heads),
        lengths(lengths),
        tables_(lengths.size()),
        queries_(lengths.size()),
        slopes(size_t(heads.q)),
        cache(cache_size(heads, lengths)) {
    std::vector<int> ids(total_pages(lengths));
    for (size_t i = 0; i < ids.size(); i++) ids[i] = int(i) + 1;
    for (size_t i = ids.size(); i > 1; i--) std::swap(ids[i - 1], ids[size_t(random.between(0, int(i) - 1))]);
    for (float& slope : slopes) slope = heads.with_slopes ? random.uniform(0, 0.5) : 0;
    for (size_t s = 0; s < lengths.size(); s++) {
      int first_visible = heads.window ? std::max(0, oldest_query[s] + 1 - heads.window) : 0;
      for (int page = 0; page * PAGE_TOKENS < lengths[s]; page++) {
        int id = ids.back();
        ids.pop_back();
        // The id of a block that was let go is never to be followed.
        bool kept = page >= first_visible / PAGE_TOKENS;
        tables_[s].push_back(kept ? id : -1);
        for (int t = page * PAGE_TOKENS; kept && t < std::min(lengths[s], (page + 1) * PAGE_TOKENS); t++)
          for (int side = 0; side < 2; side++)
            for (int head = 0; head < heads.kv; head++)
              for (int i = 0; i < heads.d; i++) cache[at(id, side, head, t, i)] = bf16(random.normal());
      }
      queries_[s].resize(size_t(lengths[s]) * heads.q * heads.d);
      for (float& value : queries_[s]) value = random.normal();
    }
  }

  const Heads heads;
  const std::vector<int> lengths;

 private:
  std::vector<std::vector<int>> tables_;
  std::vector<std::vector<float>> queries_;

 public:
  Buffer<float> slopes;
  Buffer<bf16> cache;

  const float* query(int sequence, int position, int head) const {
    return &queries_[size_t(sequence)][(size_t(position) * heads.q + head) * heads.d];
  }
  const std::vector<int>& table(int sequence) const { return tables_[size_t(sequence)]; }
  const float* slopes_or_null() const { return heads.with_slopes ? slopes.data() : nullptr; }

  // Attention of one query head, `rounded` to bf16 before it is multiplied.
  std::vector<double> twin(int sequence, int position, int head, bool rounded) const {
    int first = heads.window ? std::max(0, position + 1 - heads.window) : 0, kv_head = head / heads.group();
    const float* q = query(sequence, position, head);
    std::vector<double> scores, out(size_t(heads.d), 0.0);
    double largest = -INFINITY, sum = 0;
    for (int key = first; key <= position; key++) {
      double dot = 0;
      for (int i = 0; i < heads.d; i++)
        dot += (rounded ? number(bf16(q[i])) : q[i]) * cached(sequence, 0, kv_head, key, i);
      scores.push_back(dot * heads.scale + double(slopes[size_t(head)]) * (key - position));
      largest = std::max(largest, scores.back());
    }
    for (int key = first; key <= position; key++) {
      double weight = std::exp(scores[size_t(key - first)] - largest);
      sum += weight;
      for (int i = 0; i < heads.d; i++) out[size_t(i)] += weight * cached(sequence, 1, kv_head, key, i);
    }
    for (double& value : out) value /= sum;
    return out;
  }

 private:
  static size_t total_pages(const std::vector<int>& lengths) {
    size_t pages = 0;
    for (int length : lengths) pages += size_t((length + PAGE_TOKENS - 1) / PAGE_TOKENS);
    return pages;
  }
  static size_t cache_size(const Heads& heads, const std::vector<int>& lengths) {
    return (total_pages(lengths) + 1) * 2 * heads.kv * PAGE_TOKENS * heads.d;
  }
  size_t at(int block, int side, int head, int token, int i) const {
    return (((size_t(block) * 2 + side) * heads.kv + head) * PAGE_TOKENS + token % PAGE_TOKENS) * heads.d + i;
  }
  double cached(int sequence, int side, int head, int token, int i) const {
    return number(cache[at(table(sequence)[size_t(token / PAGE_TOKENS)], side, head, token, i)]);
  }
};

// A batch of spans as the kernels take it: their rows one after another, a row of poison before each.
struct SceneBatch {
  SceneBatch(const Scene& scene, const std::vector<SpanOf>& spans)
      : spans(spans),
        rows(ints(spans, [&](size_t s) { return first_row(spans, s); })),
        positions(ints(spans, [&](size_t s) { return spans[s].first; })),
        lens(ints(spans, [&](size_t s) { return spans[s].count; })),
        table_starts(ints(spans, [&](size_t s) { return first_entry(spans, s); })),
        tables(std::max<size_t>(1, size_t(first_entry(spans, spans.size())))),
        qkv(size_t(first_row(spans, spans.size())) * scene.heads.qkv_width()),
        out(size_t(first_row(spans, spans.size())) * scene.heads.q * scene.heads.d) {
    for (size_t s = 0; s < spans.size(); s++) {
      const SpanOf& span = spans[s];
      if (span.count == 0) continue;
      for (int page = 0; page < pages(span); page++)
        tables[size_t(table_starts[s] + page)] = scene.table(span.sequence)[size_t(page)];
      for (int i = 0; i < span.count; i++)
        for (int head = 0; head < scene.heads.q; head++)
          std::copy_n(
              scene.query(span.sequence, span.first + i, head), scene.heads.d,
              qkv.data() + size_t(rows[s] + i) * scene.heads.qkv_width() + size_t(head) * scene.heads.d);
    }
  }

  const std::vector<SpanOf> spans;
  Buffer<int> rows, positions, lens, table_starts, tables;
  Buffer<float> qkv;
  Buffer<bf16> out;

  // Pages up to the span's last query.
  static int pages(const SpanOf& span) {
    return span.count ? (span.first + span.count + PAGE_TOKENS - 1) / PAGE_TOKENS : 0;
  }

 private:
  template <class Value>
  static std::vector<int> ints(const std::vector<SpanOf>& spans, Value value) {
    std::vector<int> values;
    for (size_t s = 0; s < spans.size(); s++) values.push_back(value(s));
    return values;
  }
  static int first_row(const std::vector<SpanOf>& spans, size_t of) {
    int row = 1;
    for (size_t s = 0; s < of; s++) row += std::max(1, spans[s].count) + 1;
    return row;
  }
  static int first_entry(const std::vector<SpanOf>& spans, size_t of) {
    int entry = 0;
    for (size_t s = 0; s < of; s++) entry += pages(spans[s]);
    return entry;
  }
};

// Compares the rows of a batch's spans with the twin. A weight of the softmax that was rounded to bf16 and
// the rounding of the result are each off by at most 2^-9.
inline void compare_with_twin(Run& run, const Scene& scene, const SceneBatch& batch, bool rounded) {
  const Heads& heads = scene.heads;
  for (size_t s = 0; s < batch.spans.size(); s++) {
    const SpanOf& span = batch.spans[s];
    for (int i = 0; i < span.count; i++)
      for (int head = 0; head < heads.q; head++) {
        std::vector<double> want = scene.twin(span.sequence, span.first + i, head, rounded);
        for (int e = 0; e < heads.d; e++) {
          double got = number(batch.out[(size_t(batch.rows[s] + i) * heads.q + head) * heads.d + e]);
          run.check(std::fabs(got - want[size_t(e)]) <= 5e-3 * (std::fabs(want[size_t(e)]) + 1),
                    "d %d, heads %d:%d, window %d, position %d, head %d, column %d: %.6g, expected %.6g",
                    heads.d, heads.q, heads.kv, heads.window, span.first + i, head, e, got, want[size_t(e)]);
        }
      }
  }
}

}  // namespace harness
