// Forward. The vocabulary is cut into kParts parts, by V alone. A part is walked in panels of
// kColumns columns, packed once; over each panel walk all rows, in tiles of kRows. A tile of
// logits leaves the accumulator in float32, is folded into the running maximum and sum of its
// rows, and is overwritten, or kept if the cache has room for its panel. Parts are merged in
// ascending order at the end, so neither the number of threads nor the other rows change a bit of
// a row.
#include "tiles.h"

namespace mcpo {

namespace {

// Maximum and sum of every row, by part.
template <class Acc>
struct Parts {
  Parts(int64_t num_parts, int64_t num_tokens)
      : maximum(num_parts * num_tokens), sum(num_parts * num_tokens) {
    std::fill(maximum.data, maximum.data + num_parts * num_tokens,
              -std::numeric_limits<Acc>::infinity());
    std::fill(sum.data, sum.data + num_parts * num_tokens, Acc(0));
  }
  Buffer<Acc> maximum, sum;
};

template <class In, class Acc>
void fold_tile(const Problem<In, Acc>& problem, Acc* tile, int64_t first_row, int64_t rows,
               int64_t first_column, int64_t width, Acc* maximum, Acc* sum, Acc* target,
               Acc* panel_lse, int64_t panel_lse_stride) {
  const Acc* bias = problem.head.bias ? problem.head.bias + first_column : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    Acc* z = tile + r * kColumns;
    finish(z, bias, kColumns, problem.head);
    if (width < kColumns)
      std::fill(z + width, z + kColumns, -std::numeric_limits<Acc>::infinity());
    const Acc added = fold(z, kColumns, maximum + r, sum + r);
    if (panel_lse) panel_lse[r * panel_lse_stride] = maximum[r] + std::log(added);
    const int64_t place = problem.target[first_row + r] - first_column;
    if (place >= 0 && place < width) target[r] = z[place];
  }
}

template <class Acc>
void merge(const Parts<Acc>& parts, int64_t num_parts, int64_t num_tokens,
           const Partial<Acc>& result) {
  at::parallel_for(0, num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Acc maximum = -std::numeric_limits<Acc>::infinity(), sum = 0;
      for (int64_t part = 0; part < num_parts; ++part)
        maximum = std::max(maximum, parts.maximum.data[part * num_tokens + n]);
      const Acc shift = std::isinf(maximum) && maximum < 0 ? Acc(0) : maximum;
      for (int64_t part = 0; part < num_parts; ++part)
        sum += parts.sum.data[part * num_tokens + n] *
               std::exp(parts.maximum.data[part * num_tokens + n] - shift);
      result.maximum[n] = maximum;
      result.sum[n] = sum;
    }
  });
}

}  // namespace

template <class In, class Op, class Acc>
void forward(const Problem<In, Acc>& problem, const Cache<Acc>& cache, const Partial<Acc>& result,
             bool portable) {
  const int64_t num_tokens = problem.num_tokens, num_hidden = problem.num_hidden;
  const int64_t inner = round_up(num_hidden, kInner<Op>), stride = round_up(inner, 32) + 32;
  const int64_t padded = round_up(num_tokens, kRowMultiple);
  Buffer<Op> hidden(padded * stride);
  gather_rows(problem.hidden, problem.hidden_stride, static_cast<const int64_t*>(nullptr),
              num_tokens, num_hidden, hidden.data, stride, padded);

  const int64_t num_panels = ceil_div(problem.num_vocab, kColumns);
  const int64_t num_parts = std::min(num_panels, kParts);
  const int64_t num_tiles = ceil_div(num_tokens, kRows), groups = groups_for(num_parts, num_tiles);
  Parts<Acc> parts(num_parts, num_tokens);
  std::fill(result.target_logit, result.target_logit + num_tokens, Acc(0));

  const int64_t threads = at::get_num_threads(), panel_size = inner * kColumns;
  Buffer<Op> panels(threads * panel_size), scratches(threads * 16 * inner);
  Buffer<Acc> tiles(threads * kRows * kColumns);
  const Product<Op> product{portable};

  each(num_parts * groups, [&](int64_t task, int64_t thread) {
    const int64_t part = task / groups, group = task % groups;
    Op* panel = panels.data + thread * panel_size;
    Acc* tile = tiles.data + thread * kRows * kColumns;
    for (int64_t p = num_panels * part / num_parts; p < num_panels * (part + 1) / num_parts; ++p) {
      const int64_t column = p * kColumns, width = std::min(kColumns, problem.num_vocab - column);
      pack_transposed(problem.weight + column * problem.weight_stride, problem.weight_stride, width,
                      num_hidden, panel, scratches.data + thread * 16 * inner);
      for (int64_t t = num_tiles * group / groups; t < num_tiles * (group + 1) / groups; ++t) {
        const int64_t row = t * kRows, place = part * num_tokens + row;
        const int64_t rows = std::min(kRows, num_tokens - row);
        Acc* kept = p < cache.num_panels ? cache.logits + (p * num_tokens + row) * kColumns : nullptr;
        // The products of a last tile are padded, and would reach beyond the rows of the cache.
        const bool in_place = kept && rows == kRows;
        Acc* logits = in_place ? kept : tile;
        product(std::min(kRows, padded - row), kColumns, inner, hidden.data + row * stride, stride,
                panel, kColumns, logits, kColumns, false);
        fold_tile(problem, logits, row, rows, column, width, parts.maximum.data + place,
                  parts.sum.data + place, result.target_logit + row,
                  cache.panel_lse ? cache.panel_lse + row * num_panels + p : nullptr, num_panels);
        if (kept && !in_place) std::copy_n(tile, rows * kColumns, kept);
      }
    }
    product.release();
  });
  merge(parts, num_parts, num_tokens, result);
}

template void forward<at::BFloat16, at::BFloat16, float>(const Problem<at::BFloat16, float>&,
                                                         const Cache<float>&,
                                                         const Partial<float>&, bool);
template void forward<at::BFloat16, float, float>(const Problem<at::BFloat16, float>&,
                                                  const Cache<float>&, const Partial<float>&, bool);
template void forward<at::Half, float, float>(const Problem<at::Half, float>&, const Cache<float>&,
                                              const Partial<float>&, bool);
template void forward<float, float, float>(const Problem<float, float>&, const Cache<float>&,
                                           const Partial<float>&, bool);
template void forward<double, double, double>(const Problem<double, double>&,
                                              const Cache<double>&, const Partial<double>&, bool);

}  // namespace mcpo
