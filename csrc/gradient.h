// What the two walks of the backward share: the rows with gradient, one tile of dz, and dhidden.
#pragma once

#include "tiles.h"

namespace mcpo {

// M rows have gradient; `padded` of them are multiplied.
template <class In, class Op, class Acc>
struct Gradient {
  Gradient(const Problem<In, Acc>& problem, const Upstream<In, Acc>& upstream, bool portable)
      : problem(problem),
        upstream(upstream),
        product{portable},
        num_rows(upstream.num_rows),
        padded(round_up(num_rows, kRowMultiple)),
        num_tiles(ceil_div(num_rows, kRows)),
        num_blocks(ceil_div(problem.num_hidden, kHidden)),
        inner(round_up(problem.num_hidden, kInner<Op>)),
        hidden_stride(round_up(problem.num_hidden, kHidden) + 32),
        turned_stride(padded + 32),
        sum_stride(num_blocks * kHidden + 16),
        scratch_size(std::max(16 * inner, 2 * kHidden)),
        hidden(padded * hidden_stride),
        sum(upstream.dhidden ? padded * sum_stride : 0),
        dz(upstream.dhidden ? padded * (kSlab<Op> + 32) : 0),
        turned(upstream.dweight ? kSlab<Op> * turned_stride : 0),
        weight_panels(upstream.dhidden ? num_blocks * kSlab<Op> * kHidden : 0),
        dbias(upstream.dbias ? num_tiles * kSlab<Op> : 0),
        panels(at::get_num_threads() * inner * kColumns),
        scratches(at::get_num_threads() * scratch_size),
        tiles(at::get_num_threads() * 2 * kRows * kColumns) {
    gather_rows(problem.hidden, problem.hidden_stride, upstream.row, num_rows, problem.num_hidden,
                hidden.data, hidden_stride, padded);
  }

  Op* panel(int64_t thread) { return panels.data + thread * inner * kColumns; }
  Op* scratch(int64_t thread) { return scratches.data + thread * scratch_size; }
  Acc* tile(int64_t thread) { return tiles.data + thread * 2 * kRows * kColumns; }
  int64_t width_of(int64_t column, int64_t most) const {
    return std::min(most, problem.num_vocab - column);
  }

  // The logits that the forward kept of the panel at `column` [N, kColumns], or null.
  const Acc* kept(int64_t column) const {
    const int64_t p = column / kColumns;
    return p < upstream.cache.num_panels
               ? upstream.cache.logits + p * problem.num_tokens * kColumns
               : nullptr;
  }

  // What the products of the panel at `column` read of the weight; `p` is its place in the slab.
  void pack(int64_t column, int64_t p, bool for_dhidden, int64_t thread) {
    const int64_t width = width_of(column, kColumns), stride = problem.weight_stride;
    const In* weight = problem.weight + column * stride;
    if (!kept(column))
      pack_transposed(weight, stride, width, problem.num_hidden, panel(thread), scratch(thread));
    if (!for_dhidden) return;
    // By rows too, while it is in the caches.
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * kHidden;
      pack_rows([&](int64_t k) { return weight + k * stride + first; }, width,
                round_up(width, 16), std::min(kHidden, problem.num_hidden - first),
                weight_panel(block, p), scratch(thread));
    }
  }

  Op* weight_panel(int64_t block, int64_t p) {
    return weight_panels.data + (block * kSlab<Op> + p * kColumns) * kHidden;
  }

  // The tile of dz of `rows` rows, zeros after the first `count`. Row r is row_of(r) of M, and
  // `operand` holds them; it is not read where the logits were kept.
  template <class RowOf>
  void dz_tile(const Op* operand, int64_t count, int64_t rows, int64_t column, const RowOf& row_of,
               int64_t thread) {
    Acc* z = tile(thread);
    const Acc* from = kept(column);
    if (!from)
      product(rows, kColumns, inner, operand, hidden_stride, panel(thread), kColumns, z, kColumns,
              false);
    for (int64_t r = 0; r < count; ++r) row_gradient(z + r * kColumns, from, row_of(r), column);
    std::fill(z + count * kColumns, z + rows * kColumns, Acc(0));
  }

  void row_gradient(Acc* z, const Acc* from, int64_t m, int64_t column) {
    const Head<Acc>& head = problem.head;
    const int64_t n = upstream.row[m], width = width_of(column, kColumns);
    const int64_t place = problem.target[n] - column;
    const Acc grad = upstream.grad[n];
    const bool inside = place >= 0 && place < width;
    if (from)
      std::copy_n(from + n * kColumns, kColumns, z);
    else
      finish(z, head.bias ? head.bias + column : nullptr, kColumns, head);
    const Acc target_logit = inside ? z[place] : Acc(0);
    dlogits(z, kColumns, upstream.lse[n], grad, head);
    if (inside) {
      // 1 - p from log p: exact where p is so near 1 that the difference would round to 0.
      const Acc tangent = head.softcap > 0 ? target_logit / head.softcap : Acc(0);
      z[place] = -grad * std::expm1(upstream.logp[n]) * (1 - tangent * tangent) * head.scale;
    }
    std::fill(z + width, z + kColumns, Acc(0));
  }

  void sum_columns(const Acc* z, int64_t rows, int64_t t, int64_t p) {
    Acc* to = dbias.data + t * kSlab<Op> + p * kColumns;
    std::fill(to, to + kColumns, Acc(0));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kColumns; ++c) to[c] += z[r * kColumns + c];
  }

  // Columns of the panel at `column` from the sums of its first `count` tiles.
  void write_dbias(int64_t column, int64_t p, int64_t count) {
    for (int64_t c = 0; c < width_of(column, kColumns); ++c) {
      Acc total = 0;
      for (int64_t t = 0; t < count; ++t) total += dbias.data[t * kSlab<Op> + p * kColumns + c];
      upstream.dbias[column + c] = static_cast<In>(total);
    }
  }

  // A block of `rows` rows of dweight, from their sums.
  void write_dweight(const Acc* from, int64_t first_row, int64_t rows, int64_t block) {
    const int64_t first = block * kHidden;
    for (int64_t r = 0; r < rows; ++r)
      convert(from + r * kHidden, upstream.dweight + (first_row + r) * problem.num_hidden + first,
              std::min(kHidden, problem.num_hidden - first));
  }

  void write_dhidden() {
    at::parallel_for(0, num_rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        convert(sum.data + r * sum_stride, upstream.dhidden + upstream.row[r] * problem.num_hidden,
                problem.num_hidden);
    });
  }

  const Problem<In, Acc>& problem;
  const Upstream<In, Acc>& upstream;
  const Product<Op> product;
  const int64_t num_rows, padded, num_tiles, num_blocks, inner;
  const int64_t hidden_stride, turned_stride, sum_stride, scratch_size;
  Buffer<Op> hidden;         // [padded, hidden_stride]
  Buffer<Acc> sum;           // dhidden [padded, sum_stride]
  Buffer<Op> dz, turned;     // of a slab, as each walk wants them
  Buffer<Op> weight_panels;  // of a slab [num_blocks, slab, kHidden]
  Buffer<Acc> dbias;         // of a slab [num_tiles, slab]
  Buffer<Op> panels, scratches;
  Buffer<Acc> tiles;
};

// A row meets the panels that hold all but a share of its softmax.
template <class In, class Op, class Acc>
void backward_filtered(Gradient<In, Op, Acc>& gradient);

}  // namespace mcpo
