// Cases of rows.cu.
#include "harness.h"

namespace {

rig::Launch any_pieces(harness::Random& random, int rows) {
  return {{unsigned(rows), unsigned(random.between(1, 3)), 1}, {256, 1, 1}};
}

template <class T>
void fill(Buffer<T>& values, harness::Random& random) {
  for (T& value : values) value = T(random.normal());
}

}  // namespace

CASE(embed_gives_rows_of_the_slice_and_zeros_for_the_others) {
  int tokens = run.random.between(1, 5), n = run.random.between(1, 30), k = run.random.between(1, 900);
  int ld = (k + 7) / 8 * 8;
  if (run.random.coin()) k = ld;
  unsigned first = run.random.coin() ? 0 : 1000;
  Buffer<bf16> table(n * ld);
  Buffer<float> out(tokens * k);
  Buffer<unsigned> ids(tokens);
  fill(table, run.random);
  for (unsigned& id : ids) id = first - (first ? 5 : 0) + run.random.between(0, n + 9);
  run.launch("embed", any_pieces(run.random, tokens), out.data(), table.data(), ids.data(), first, n, k, ld);
  run.equal("out", out, [&](size_t i) {
    unsigned id = ids[i / k];
    return id >= first && id < first + n ? harness::number(table[(id - first) * ld + i % k]) : 0.0;
  });
}

CASE(gather_rows_takes_the_named_rows_or_those_from_a_first_one_on) {
  int rows = run.random.between(1, 6), wanted = run.random.between(1, rows),
      width = run.random.between(1, 1200);
  bool named = run.random.coin();
  int first = named ? 0 : rows - wanted;
  Buffer<float> x(rows * width), out(wanted * width);
  Buffer<unsigned> which(wanted);
  fill(x, run.random);
  for (unsigned& row : which) row = run.random.between(0, rows - 1);
  run.launch("gather_rows", any_pieces(run.random, wanted), out.data(), x.data(),
             named ? which.data() : nullptr, first, width);
  run.equal("out", out, [&](size_t i) {
    size_t row = named ? which[i / width] : first + i / width;
    return x[row * width + i % width];
  });
}

namespace {

template <class From>
void copies_the_columns_alone(Run& run, const char* kernel) {
  int unit = run.random.coin() ? 4 : 1, rows = run.random.between(1, 4),
      columns = unit * run.random.between(1, 300);
  int to_first = unit * run.random.between(0, 20), from_first = unit * run.random.between(0, 20);
  int to_width = to_first + columns + unit * run.random.between(0, 9);
  int from_width = from_first + columns + unit * run.random.between(0, 9);
  if (run.random.coin()) columns -= unit / 2;  // a tail behind the vectors
  Buffer<From> from(rows * from_width);
  Buffer<float> to(rows * to_width);
  fill(from, run.random), fill(to, run.random);
  std::vector<float> before(to.begin(), to.end());
  run.launch(kernel, any_pieces(run.random, rows), to.data(), to_width, to_first, from.data(), from_width,
             from_first, columns);
  run.equal("to", to, [&](size_t i) {
    int row = i / to_width, column = int(i % to_width) - to_first;
    if (column < 0 || column >= columns) return double(before[i]);
    return harness::number(from[row * from_width + from_first + column]);
  });
}

}  // namespace

CASE(copy_columns_changes_the_named_columns_alone) { copies_the_columns_alone<float>(run, "copy_columns"); }
CASE(copy_columns_bf16_changes_the_named_columns_alone) {
  copies_the_columns_alone<bf16>(run, "copy_columns_bf16");
}
