// Backward. Rows without gradient are gone before it begins. The vocabulary is walked in slabs of
// kSlab columns, each in two steps:
//
//   1. the slab's logits are computed again, tile by tile, or read where the forward kept them,
//      and become dz = grad (onehot - p) with the forward's lse; dz is kept in the type of the
//      operands, by rows and transposed;
//   2. dhidden [M, D] += dz weight, and the slab of dweight = dz^T hidden, summed over all rows in
//      float32 and written once.
//
// Every number is added up by one thread in an order that depends on shapes alone, so the number
// of threads changes no bit.
#include "gradient.h"

namespace mcpo {

namespace {

template <class In, class Op, class Acc>
class Whole {
 public:
  explicit Whole(Gradient<In, Op, Acc>& gradient)
      : g_(gradient), hidden_panels_(g_.upstream.dweight ? g_.num_blocks * g_.padded * kHidden : 0) {}

  void run() {
    if (g_.upstream.dweight)
      each(g_.num_blocks, [&](int64_t block, int64_t thread) {
        const Op* from = g_.hidden.data + block * kHidden;
        pack_rows([&](int64_t k) { return from + k * g_.hidden_stride; }, g_.padded, g_.padded,
                  std::min(kHidden, g_.hidden_stride - block * kHidden), hidden_panel(block),
                  g_.scratch(thread));
      });
    for (int64_t column = 0; column < g_.problem.num_vocab; column += kSlab<Op>) slab(column);
  }

 private:
  // Not a power of two, so that rows do not fall on one another in the caches.
  static constexpr int64_t kRowStride = kSlab<Op> + 32;

  Op* hidden_panel(int64_t block) { return hidden_panels_.data + block * g_.padded * kHidden; }

  void slab(int64_t column) {
    const int64_t width = g_.width_of(column, kSlab<Op>);
    const int64_t num_panels = ceil_div(width, kColumns);
    const int64_t groups = groups_for(num_panels, g_.num_tiles);
    each(num_panels * groups, [&](int64_t task, int64_t thread) {
      logit_gradients(column + task / groups * kColumns, task / groups, task % groups, groups,
                      thread);
      g_.product.release();
    });

    const int64_t block_groups = ceil_div(g_.num_blocks, kBlocks);
    const int64_t num_dhidden = g_.upstream.dhidden ? g_.num_tiles * block_groups : 0;
    const int64_t num_dweight =
        g_.upstream.dweight ? ceil_div(width, kWeightRows) * block_groups : 0;
    each(num_dhidden + num_dweight, [&](int64_t task, int64_t thread) {
      const int64_t group = task % block_groups;
      if (task < num_dhidden)
        add_to_dhidden(column, width, task / block_groups, group);
      else
        sum_dweight(column, width, (task - num_dhidden) / block_groups, group, thread);
      g_.product.release();
    });
    if (g_.upstream.dbias)
      for (int64_t p = 0; p < num_panels; ++p)
        g_.write_dbias(column + p * kColumns, p, g_.num_tiles);
  }

  // Step 1 for one panel of the slab and a group of the row tiles.
  void logit_gradients(int64_t column, int64_t p, int64_t group, int64_t groups, int64_t thread) {
    Acc* tile = g_.tile(thread);
    g_.pack(column, p, g_.upstream.dhidden && group == 0, thread);
    for (int64_t t = g_.num_tiles * group / groups; t < g_.num_tiles * (group + 1) / groups; ++t) {
      const int64_t row = t * kRows, rows = std::min(kRows, g_.padded - row);
      g_.dz_tile(g_.hidden.data + row * g_.hidden_stride, std::min(kRows, g_.num_rows - row), rows,
                 column, [row](int64_t r) { return row + r; }, thread);
      if (g_.upstream.dbias) g_.sum_columns(tile, rows, t, p);
      if (g_.upstream.dhidden)
        for (int64_t r = 0; r < rows; ++r)
          convert(tile + r * kColumns, g_.dz.data + (row + r) * kRowStride + p * kColumns, kColumns);
      if (g_.upstream.dweight)
        transpose(tile, rows, kColumns, g_.turned.data + p * kColumns * g_.turned_stride + row,
                  g_.turned_stride, tile + kRows * kColumns);
    }
  }

  // Step 2: a tile of rows of dhidden, for a group of the blocks of the hidden size.
  void add_to_dhidden(int64_t column, int64_t width, int64_t tile, int64_t group) {
    const int64_t row = tile * kRows, rows = std::min(kRows, g_.padded - row);
    const int64_t end = std::min(g_.num_blocks, (group + 1) * kBlocks);
    for (int64_t block = group * kBlocks; block < end; ++block)
      g_.product(rows, kHidden, round_up(width, 16), g_.dz.data + row * kRowStride, kRowStride,
                 g_.weight_panel(block, 0), kHidden,
                 g_.sum.data + row * g_.sum_stride + block * kHidden, g_.sum_stride, column > 0);
  }

  // Step 2: kWeightRows rows of dweight, for a group of the blocks of the hidden size.
  void sum_dweight(int64_t column, int64_t width, int64_t part, int64_t group, int64_t thread) {
    Acc* tile = g_.tile(thread);
    const int64_t first_row = part * kWeightRows, rows = std::min(kWeightRows, width - first_row);
    const int64_t end = std::min(g_.num_blocks, (group + 1) * kBlocks);
    const Op* turned = g_.turned.data + first_row * g_.turned_stride;
    for (int64_t block = group * kBlocks; block < end; ++block) {
      for (int64_t k = 0; k < g_.padded; k += kTokens)
        g_.product(round_up(rows, kColumns), kHidden, std::min(kTokens, g_.padded - k), turned + k,
                   g_.turned_stride, hidden_panel(block) + k * kHidden, kHidden, tile, kHidden,
                   k > 0);
      g_.write_dweight(tile, column + first_row, rows, block);
    }
  }

  Gradient<In, Op, Acc>& g_;
  Buffer<Op> hidden_panels_;  // [num_blocks, padded, kHidden]
};

}  // namespace

template <class In, class Op, class Acc>
void backward(const Problem<In, Acc>& problem, const Upstream<In, Acc>& upstream, bool portable) {
  Gradient<In, Op, Acc> gradient(problem, upstream, portable);
  if (upstream.cache.panel_lse)
    backward_filtered(gradient);
  else
    Whole<In, Op, Acc>(gradient).run();
  if (upstream.dhidden) gradient.write_dhidden();
}

template void backward<at::BFloat16, at::BFloat16, float>(const Problem<at::BFloat16, float>&,
                                                          const Upstream<at::BFloat16, float>&,
                                                          bool);
template void backward<at::BFloat16, float, float>(const Problem<at::BFloat16, float>&,
                                                   const Upstream<at::BFloat16, float>&, bool);
template void backward<at::Half, float, float>(const Problem<at::Half, float>&,
                                               const Upstream<at::Half, float>&, bool);
template void backward<float, float, float>(const Problem<float, float>&,
                                            const Upstream<float, float>&, bool);
template void backward<double, double, double>(const Problem<double, double>&,
                                               const Upstream<double, double>&, bool);

}  // namespace mcpo
