// From rows of logits to tokens: the very choice that the host's sampler makes (engine::sampler, steps 1 and
// 7 to 12).
//
// A block owns a row. Where sums decide, they are the host's: weights by the same polynomial with no fused
// operation, added in f64 in the same order. A GPU likes no such chains, so they are kept short:
// - Without filters, the host sums runs of 256 tokens in eight interleaved chains each: eight threads a run
// do just that.
//   One thread then adds the runs (500 for a vocabulary of 128,000), finds the one that holds the draw, and
//   walks it.
// - Filters need tokens in falling order, ties by id. Instead of sorting the row, the block finds by counting
// a
//   threshold above which at most SLICE tokens lie, but enough; gathers them; sorts these in shared memory;
//   and one thread walks them from the best. Only where more tokens survive does the next slice follow. With
//   min_p alone the host goes by id, and so does the slice.
// - What top_p is a share of, the sum over the whole row, is first added in any order. Its error is bounded;
// only where
//   the cut falls between the bounds is it added anew in the host's order (16,000 additions a chain).
// So equal bits in the logits give equal tokens. Nothing here has run on hardware.
#define BLOCKS_MIN 1  // few rows are drawn at once: registers without spills before blocks side by side
#include "device.cuh"

typedef unsigned long long Key;

constexpr int SLICE = 4096;
constexpr int RUN = 256;
constexpr int CHAINS = 8;
constexpr unsigned NO_TOKEN = 0xffffffffu;
constexpr Key NO_KEY = ~0ull;

// e^x for x <= 0, the same bits as the host's: sampler/softmax.rs tells the idea.
__device__ __forceinline__ float exp_as_host(float x) {
  constexpr float LEAST = -87.0f, ROUND = 12582912.0f, LN_2_HIGH = 0.6933594f, LN_2_LOW = -2.1219444e-4f;
  const float clamped = x > LEAST ? x : LEAST;
  const float rounded = __fadd_rn(__fmul_rn(clamped, 1.44269504f), ROUND);
  const float whole = __fsub_rn(rounded, ROUND);
  const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(whole, LN_2_HIGH)), __fmul_rn(whole, LN_2_LOW));
  float p = 1.9875691e-4f;
  p = __fadd_rn(__fmul_rn(p, r), 1.3982e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 0.5f);
  const float value = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
  const float two_to_whole = __uint_as_float((__float_as_uint(rounded) << 23) + 0x3f800000u);
  return x < LEAST ? 0.0f : __fmul_rn(value, two_to_whole);
}

// Smaller keys first: larger logits, of equals the lower ids. Zero has two signs and is one value.
__device__ __forceinline__ Key rank_key(float x, unsigned id) {
  const unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  const unsigned rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(~rising) << 32 | id;
}

// The logit of a rank key.
__device__ __forceinline__ float logit_of(Key key) {
  const unsigned rising = ~static_cast<unsigned>(key >> 32);
  return __uint_as_float(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

// Shared memory of a block.
struct Memory {
  Key entries[SLICE];  // of a slice: keys while it is sorted, then weight (high) and id (low); else a tile of
                       // numbers
  Key key_parts[32];
  double sum_parts[32];
  int count_parts[32];
  int filled;
  int run;
  double left;
};

// A row of logits and its softmax, relative to the largest logit. All members are equal in all threads of a
// block.
struct Row {
  const float* logits;
  int vocab;
  float max, scale;
  Memory* memory;

  __device__ __forceinline__ float weight(float x) const {
    return exp_as_host(__fmul_rn(__fsub_rn(x, max), scale));
  }

  // The sum of all weights, in some order.
  __device__ __forceinline__ double sum_in_any_order() const {
    double sum = 0.0;
#pragma unroll 4
    for (int id = threadIdx.x; id < vocab; id += blockDim.x) sum += static_cast<double>(weight(logits[id]));
    return block_reduce(sum, 0.0, memory->sum_parts, Sum());
  }

  // The sum of all weights in the host's order: token i in chain i % 8, then the chains. Right in warp 0.
  __device__ __forceinline__ double sum_in_order() const {
    constexpr int TILE = 2 * SLICE;
    float* tile = reinterpret_cast<float*>(memory->entries);
    double chain = 0.0;
    for (int first = 0; first < vocab; first += TILE) {
      const int count = min(TILE, vocab - first);
      for (int i = threadIdx.x; i < count; i += blockDim.x) tile[i] = weight(logits[first + i]);
      __syncthreads();
      if (threadIdx.x < CHAINS) {
#pragma unroll 8
        for (int i = threadIdx.x; i < count; i += CHAINS) chain += static_cast<double>(tile[i]);
      }
      __syncthreads();
    }
    return sum_of_chains(chain, 0);
  }

  // Adds the values of eight lanes from `first` on in their order; all lanes of the warp take part.
  __device__ __forceinline__ static double sum_of_chains(double chain, int first) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += __shfl_sync(WARP_ALL, chain, first + i);
    return sum;
  }

  // The first token, by id, at which the running sum exceeds u of all; thread 0's answer counts.
  __device__ __forceinline__ unsigned draw(double u) const {
    double* sums = reinterpret_cast<double*>(memory->entries);
    const int runs = (vocab + RUN - 1) / RUN, thread = threadIdx.x;
    for (int first = 0; first < runs; first += blockDim.x / CHAINS) {
      const int run = first + thread / CHAINS;
      double chain = 0.0;
#pragma unroll 8
      for (int i = 0; i < RUN / CHAINS; i++) {
        const int id = run * RUN + i * CHAINS + thread % CHAINS;
        if (id < vocab) chain += static_cast<double>(weight(logits[id]));
      }
      const double sum = sum_of_chains(chain, lane_id() & ~(CHAINS - 1));
      if (thread % CHAINS == 0 && run < runs) sums[run] = sum;
    }
    __syncthreads();
    if (thread == 0) {
      double total = 0.0;
#pragma unroll 8
      for (int run = 0; run < runs; run++) total += sums[run];
      double left = __dmul_rn(u, total);
      int run = 0;
      for (; run < runs && !(left < sums[run]); run++) left -= sums[run];
      memory->run = run, memory->left = left;
    }
    __syncthreads();
    const int first = memory->run * RUN, count = min(RUN, vocab - first);  // no run: a count below 1
    float* weights = reinterpret_cast<float*>(memory->entries);
    for (int i = thread; i < count; i += blockDim.x) weights[i] = weight(logits[first + i]);
    __syncthreads();
    double left = memory->left;
    for (int i = 0; thread == 0 && i < count; i++) {
      const double one = weights[i];
      if (left < one) return first + i;
      left -= one;
    }
    return NO_TOKEN;
  }
};

// The tokens that may be chosen, in the host's order, a slice at a time.
struct Survivors {
  const Row& row;
  bool ranked;  // by rank those of at least `least`; else by id those of at least the weight `least`
  float least;
  Key from,
      end;  // keys of the slice in memory, whose first and whose past-the-last these are; from = NO_KEY: none
  int count;

  __device__ __forceinline__ Survivors(const Row& row, bool ranked, float least)
      : row(row), ranked(ranked), least(least), from(NO_KEY), end(0), count(0) {}

  __device__ __forceinline__ Key key(unsigned id) const {
    const float x = row.logits[id];
    if (ranked) return x >= least ? rank_key(x, id) : NO_KEY;
    return row.weight(x) >= least ? id : NO_KEY;
  }

  // How many keys lie in low .. high.
  __device__ __forceinline__ int count_between(Key low, Key high) const {
    int found = 0;
#pragma unroll 4
    for (int id = threadIdx.x; id < row.vocab; id += blockDim.x) {
      const Key one = key(id);
      found += low <= one && one < high;
    }
    __syncthreads();  // what the call before left in memory has been read
    return block_reduce(found, 0, row.memory->count_parts, Sum());
  }

  // A key between two others. Halving keys alone would dwell on the many floats around zero, halving values
  // alone on rows with one far outlier: the turns alternate.
  __device__ __forceinline__ Key between(Key low, Key high, bool by_value) const {
    if (ranked && by_value) {
      const Key middle = rank_key(0.5f * logit_of(low) + 0.5f * logit_of(high), 0);
      if (low < middle && middle < high) return middle;
    }
    return low + (high - low) / 2;
  }

  // Past-the-last key of a slice: at most SLICE tokens from `first` on, and at least `wanted` if there are so
  // many.
  __device__ __forceinline__ Key find_end(Key first, int wanted) const {
    if (count_between(first, NO_KEY) <= SLICE) return NO_KEY;
    Key low = first, high = ranked ? NO_KEY : row.vocab;
    for (bool by_value = false;; by_value = !by_value) {
      const Key middle = between(low, high, by_value);
      const int found = count_between(first, middle);
      if (found > SLICE) {
        high = middle;
      } else if (found < wanted) {
        low = middle;
      } else {
        return middle;
      }
    }
  }

  // Sorts `count` keys: a bitonic network whose comparators all point one way, so that places past the last,
  // which would hold the largest keys, never take part.
  __device__ __forceinline__ void sort() const {
    Key* keys = row.memory->entries;
    for (int size = 2; size < 2 * count; size *= 2) {
      for (int step = size; step > 1; step /= 2) {
        const int half = step / 2;
        for (int pair = threadIdx.x; pair < size / 2 * ((count + size - 1) / size); pair += blockDim.x) {
          const int place = pair & (half - 1), base = 2 * (pair - place);
          const int low = base + place, high = step == size ? base + step - 1 - place : low + half;
          if (high < count && keys[high] < keys[low]) {
            const Key larger = keys[low];
            keys[low] = keys[high];
            keys[high] = larger;
          }
        }
        __syncthreads();
      }
    }
  }

  // Brings the slice that begins with `first` to memory, ends with a barrier.
  __device__ __forceinline__ void load(Key first, int wanted) {
    from = first;
    end = find_end(first, wanted);
    if (threadIdx.x == 0) row.memory->filled = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < row.vocab; id += blockDim.x) {
      const Key one = key(id);
      if (from <= one && one < end) row.memory->entries[atomicAdd(&row.memory->filled, 1)] = one;
    }
    __syncthreads();
    count = row.memory->filled;
    sort();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const unsigned id = static_cast<unsigned>(row.memory->entries[i]);
      row.memory->entries[i] = static_cast<Key>(__float_as_uint(row.weight(row.logits[id]))) << 32 | id;
    }
    __syncthreads();
  }

  // Thread 0 visits the first `limit` tokens in order, `visit(weight, id)`, until it answers true.
  template <class Visit>
  __device__ __forceinline__ void walk(int limit, Visit visit) {
    Key first = 0;
    for (;;) {
      if (from != first) load(first, min(limit, SLICE / 4));
      bool stop = false;
      if (threadIdx.x == 0) {
        const Key* entries = row.memory->entries;
        const int visits = min(count, limit);
        Key next = entries[0];
        for (int i = 0; i < visits && !stop; i++) {
          const Key entry = next;
          next = entries[min(i + 1, visits - 1)];  // on its way while this one is added
          stop = visit(__uint_as_float(static_cast<unsigned>(entry >> 32)), static_cast<unsigned>(entry));
        }
      }
      limit -= count;
      if (__syncthreads_or(stop) || limit <= 0 || end == NO_KEY) return;
      first = end;
    }
  }
};

// The draw among what top_k, top_p and min_p leave; thread 0's answer counts.
__device__ __forceinline__ unsigned draw_filtered(const Row& row, const Draw& draw) {
  const bool by_share = draw.top_p < 1.0f, ranked = draw.top_k > 0 || by_share;
  const int limit = draw.top_k > 0 ? draw.top_k : row.vocab;
  const double top_p = draw.top_p;
  // Thread 0 cuts after the first token at which the running sum reaches the share; the cut is certain when
  // both bounds agree.
  double share_least = INFINITY, share_most = INFINITY;
  float least = ranked ? -INFINITY : draw.min_p;
  if (by_share && draw.top_k <= 0) {
    const double sum = row.sum_in_any_order(), share = top_p * sum;
    const double slack = (row.vocab + 8) * 2.5e-16 * share;  // any two orders of n additions differ by less
    share_least = share - slack, share_most = share + slack;
    // Tokens that each hold less than an equal part of what may be cut off are all cut off.
    least = static_cast<float>(row.max + (log(sum * (1.0 - top_p) / row.vocab) - 0.02) / row.scale);
  }
  Survivors survivors(row, ranked, least);
  if (by_share && draw.top_k > 0) {
    double sum = 0.0;
    survivors.walk(limit, [&](float weight, unsigned) {
      sum += weight;
      return false;
    });
    share_least = share_most = __dmul_rn(top_p, sum);
  }

  const auto kept = [&](float weight) { return !(draw.min_p > 0.0f) || weight >= draw.min_p; };
  int visited;
  double total;
  for (;;) {
    double sum = 0.0;
    bool certain = true;
    visited = 0, total = 0.0;
    survivors.walk(limit, [&](float weight, unsigned) {
      visited++;
      sum += weight;
      if (kept(weight)) total += weight;
      certain = sum < share_least || sum >= share_most;
      return sum >= share_least;
    });
    if (!__syncthreads_or(threadIdx.x == 0 && !certain)) break;
    share_least = share_most = __dmul_rn(top_p, row.sum_in_order());
    survivors.from = NO_KEY;  // the sum took its memory
  }

  double left = __dmul_rn(draw.u, total);
  unsigned chosen = NO_TOKEN;
  survivors.walk(limit, [&](float weight, unsigned id) {
    if (visited-- == 0) return true;
    if (!kept(weight)) return false;
    if (left < weight) chosen = id;
    left -= weight;
    return chosen != NO_TOKEN;
  });
  return chosen;
}

// out[i] = the token chosen by draws[i] from row draws[i].row of logits [.., vocab]; 0xffffffff where that
// row holds NaN or an infinity. vocab up to 2^20. Grid: draws; 1024 threads, or fewer for tiny vocabularies.
// lint: narrow <= 0, registers <= 64
KERNEL(1024, sample_rows, (unsigned* out, const float* logits, const Draw* draws, int vocab)) {
  __shared__ Memory memory;
  const Draw draw = draws[blockIdx.x];
  Row row = {logits + static_cast<size_t>(draw.row) * vocab, vocab, 0.0f, 0.0f, &memory};

  Key best = NO_KEY;
#pragma unroll 4
  for (int id = threadIdx.x; id < vocab; id += blockDim.x) {
    const float x = row.logits[id];
    const bool finite = (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
    best = min(best, finite ? rank_key(x, id) : 0);  // no finite logit has key 0
  }
  best = block_reduce(best, NO_KEY, memory.key_parts, Least());
  unsigned chosen = NO_TOKEN;
  if (best != 0) {
    const unsigned best_id = static_cast<unsigned>(best);
    row.max = row.logits[best_id];
    if (draw.temperature != 0.0f) {
      row.scale = fminf(__fdiv_rn(1.0f, draw.temperature), 1e30f);
      const bool filtered = draw.top_k > 0 || draw.top_p < 1.0f || draw.min_p > 0.0f;
      chosen = filtered ? draw_filtered(row, draw) : row.draw(draw.u);
    }
    // Temperature 0; or rounding left the running sum short of the last draw.
    if (chosen == NO_TOKEN) chosen = best_id;
  }
  if (threadIdx.x == 0) out[blockIdx.x] = chosen;
}
