// Backward. Rows without gradient are gone before it begins. The vocabulary is walked in slabs of
// kSlab columns, each in two steps:
//
//   1. the slab's logits are computed again, tile by tile, and become dz = grad (onehot - p) with
//      the forward's lse; dz is kept in the type of the operands, by rows and transposed;
//   2. dhidden [M, D] += dz weight, and the slab of dweight = dz^T hidden, summed over all rows in
//      float32 and written once.
//
// Every number is added up by one thread in an order that depends on shapes alone, so the number
// of threads changes no bit.
#include "tiles.h"

namespace mcpo {

namespace {

template <class In, class Op, class Acc>
class Backward {
 public:
  Backward(const Problem<In, Acc>& problem, const Upstream<In, Acc>& upstream, bool portable)
      : problem_(problem),
        upstream_(upstream),
        product_{portable},
        num_rows_(upstream.num_rows),
        padded_(round_up(upstream.num_rows, kRowMultiple)),
        num_tiles_(ceil_div(upstream.num_rows, kRows)),
        num_blocks_(ceil_div(problem.num_hidden, kHidden)),
        inner_(round_up(problem.num_hidden, kInner<Op>)),
        hidden_stride_(round_up(problem.num_hidden, kHidden) + 32),
        turned_stride_(padded_ + 32),
        sum_stride_(num_blocks_ * kHidden + 16),
        threads_(at::get_num_threads()),
        panel_size_(inner_ * kColumns),
        scratch_size_(std::max(16 * inner_, 2 * kHidden)),
        hidden_(padded_ * hidden_stride_),
        hidden_panels_(upstream.dweight ? num_blocks_ * padded_ * kHidden : 0),
        sum_(upstream.dhidden ? padded_ * sum_stride_ : 0),
        dz_(upstream.dhidden ? padded_ * kRowStride : 0),
        weight_panels_(upstream.dhidden ? num_blocks_ * kSlab<Op> * kHidden : 0),
        turned_(upstream.dweight ? kSlab<Op> * turned_stride_ : 0),
        dbias_(upstream.dbias ? num_tiles_ * kSlab<Op> : 0),
        panels_(threads_ * panel_size_),
        scratches_(threads_ * scratch_size_),
        tiles_(threads_ * 2 * kRows * kColumns) {}

  void run() {
    gather_rows(problem_.hidden, problem_.hidden_stride, upstream_.row, num_rows_,
                problem_.num_hidden, hidden_.data, hidden_stride_, padded_);
    if (upstream_.dweight)
      each(num_blocks_, [&](int64_t block, int64_t thread) {
        pack_rows(hidden_.data + block * kHidden, hidden_stride_, padded_, padded_,
                  std::min(kHidden, hidden_stride_ - block * kHidden),
                  hidden_panels_.data + block * padded_ * kHidden, scratch(thread));
      });
    for (int64_t column = 0; column < problem_.num_vocab; column += kSlab<Op>) slab(column);
    if (upstream_.dhidden)
      at::parallel_for(0, num_rows_, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          convert(sum_.data + r * sum_stride_,
                  upstream_.dhidden + upstream_.row[r] * problem_.num_hidden, problem_.num_hidden);
      });
  }

 private:
  // Not a power of two, so that rows do not fall on one another in the caches.
  static constexpr int64_t kRowStride = kSlab<Op> + 32;

  Op* panel(int64_t thread) { return panels_.data + thread * panel_size_; }
  Op* scratch(int64_t thread) { return scratches_.data + thread * scratch_size_; }

  void slab(int64_t column) {
    const int64_t width = std::min(kSlab<Op>, problem_.num_vocab - column);
    const int64_t num_panels = ceil_div(width, kColumns);
    const int64_t groups = groups_for(num_panels, num_tiles_);
    each(num_panels * groups, [&](int64_t task, int64_t thread) {
      logit_gradients(column, task / groups, task % groups, groups, thread);
      product_.release();
    });

    const int64_t block_groups = ceil_div(num_blocks_, kBlocks);
    const int64_t num_dhidden = upstream_.dhidden ? num_tiles_ * block_groups : 0;
    const int64_t num_dweight =
        upstream_.dweight ? ceil_div(width, kWeightRows) * block_groups : 0;
    each(num_dhidden + num_dweight, [&](int64_t task, int64_t thread) {
      const int64_t group = task % block_groups;
      if (task < num_dhidden)
        add_to_dhidden(column, width, task / block_groups, group);
      else
        write_dweight(column, width, (task - num_dhidden) / block_groups, group, thread);
      product_.release();
    });
    if (upstream_.dbias) write_dbias(column, width);
  }

  // Step 1 for one panel of the slab and a group of the row tiles.
  void logit_gradients(int64_t slab_column, int64_t p, int64_t group, int64_t groups,
                       int64_t thread) {
    const int64_t column = slab_column + p * kColumns;
    const int64_t width = std::min(kColumns, problem_.num_vocab - column);
    Acc* tile = tiles_.data + thread * 2 * kRows * kColumns;
    pack_transposed(problem_.weight + column * problem_.weight_stride, problem_.weight_stride,
                    width, problem_.num_hidden, panel(thread), scratch(thread));
    if (upstream_.dhidden && group == 0) pack_weight(column, width, p, thread);
    for (int64_t t = num_tiles_ * group / groups; t < num_tiles_ * (group + 1) / groups; ++t) {
      const int64_t row = t * kRows, rows = std::min(kRows, padded_ - row);
      product_(rows, kColumns, inner_, hidden_.data + row * hidden_stride_, hidden_stride_,
               panel(thread), kColumns, tile, kColumns, false);
      for (int64_t r = 0; r < rows; ++r) row_gradient(tile + r * kColumns, row + r, column, width);
      if (upstream_.dbias) sum_columns(tile, rows, dbias_.data + t * kSlab<Op> + p * kColumns);
      if (upstream_.dhidden)
        for (int64_t r = 0; r < rows; ++r)
          convert(tile + r * kColumns, dz_.data + (row + r) * kRowStride + p * kColumns, kColumns);
      if (upstream_.dweight)
        transpose(tile, rows, kColumns, turned_.data + p * kColumns * turned_stride_ + row,
                  turned_stride_, tile + kRows * kColumns);
    }
  }

  void row_gradient(Acc* z, int64_t r, int64_t column, int64_t width) {
    if (r >= num_rows_) {
      std::fill(z, z + kColumns, Acc(0));
      return;
    }
    const Head<Acc>& head = problem_.head;
    const int64_t n = upstream_.row[r], place = problem_.target[n] - column;
    const Acc grad = upstream_.grad[n];
    const bool inside = place >= 0 && place < width;
    finish(z, head.bias ? head.bias + column : nullptr, kColumns, head);
    const Acc target_logit = inside ? z[place] : Acc(0);
    dlogits(z, kColumns, upstream_.lse[n], grad, head);
    if (inside) {
      // 1 - p from log p: exact where p is so near 1 that the difference would round to 0.
      const Acc tangent = head.softcap > 0 ? target_logit / head.softcap : Acc(0);
      z[place] = -grad * std::expm1(upstream_.logp[n]) * (1 - tangent * tangent) * head.scale;
    }
    std::fill(z + width, z + kColumns, Acc(0));
  }

  static void sum_columns(const Acc* tile, int64_t rows, Acc* sum) {
    std::fill(sum, sum + kColumns, Acc(0));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kColumns; ++c) sum[c] += tile[r * kColumns + c];
  }

  // The right operand of dhidden: a panel of the slab by rows, while it is in the caches.
  void pack_weight(int64_t column, int64_t width, int64_t p, int64_t thread) {
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const int64_t first = block * kHidden;
      pack_rows(problem_.weight + column * problem_.weight_stride + first, problem_.weight_stride,
                width, round_up(width, 16), std::min(kHidden, problem_.num_hidden - first),
                weight_panels_.data + (block * kSlab<Op> + p * kColumns) * kHidden,
                scratch(thread));
    }
  }

  // Step 2: a tile of rows of dhidden, for a group of the blocks of the hidden size.
  void add_to_dhidden(int64_t column, int64_t width, int64_t tile, int64_t group) {
    const int64_t row = tile * kRows, rows = std::min(kRows, padded_ - row);
    const int64_t end = std::min(num_blocks_, (group + 1) * kBlocks);
    for (int64_t block = group * kBlocks; block < end; ++block)
      product_(rows, kHidden, round_up(width, 16), dz_.data + row * kRowStride, kRowStride,
               weight_panels_.data + block * kSlab<Op> * kHidden, kHidden,
               sum_.data + row * sum_stride_ + block * kHidden, sum_stride_, column > 0);
  }

  // Step 2: kWeightRows rows of dweight, for a group of the blocks of the hidden size.
  void write_dweight(int64_t column, int64_t width, int64_t part, int64_t group, int64_t thread) {
    Acc* tile = tiles_.data + thread * 2 * kRows * kColumns;
    const int64_t first_row = part * kWeightRows, rows = std::min(kWeightRows, width - first_row);
    const int64_t end = std::min(num_blocks_, (group + 1) * kBlocks);
    const Op* turned = turned_.data + first_row * turned_stride_;
    for (int64_t block = group * kBlocks; block < end; ++block) {
      const Op* panel = hidden_panels_.data + block * padded_ * kHidden;
      for (int64_t k = 0; k < padded_; k += kTokens)
        product_(round_up(rows, kColumns), kHidden, std::min(kTokens, padded_ - k), turned + k,
                 turned_stride_, panel + k * kHidden, kHidden, tile, kHidden, k > 0);
      const int64_t first = block * kHidden;
      for (int64_t r = 0; r < rows; ++r)
        convert(tile + r * kHidden,
                upstream_.dweight + (column + first_row + r) * problem_.num_hidden + first,
                std::min(kHidden, problem_.num_hidden - first));
    }
  }

  void write_dbias(int64_t column, int64_t width) {
    for (int64_t c = 0; c < width; ++c) {
      Acc sum = 0;
      for (int64_t t = 0; t < num_tiles_; ++t) sum += dbias_.data[t * kSlab<Op> + c];
      upstream_.dbias[column + c] = static_cast<In>(sum);
    }
  }

  const Problem<In, Acc>& problem_;
  const Upstream<In, Acc>& upstream_;
  const Product<Op> product_;
  const int64_t num_rows_, padded_, num_tiles_, num_blocks_, inner_;
  const int64_t hidden_stride_, turned_stride_, sum_stride_;
  const int64_t threads_, panel_size_, scratch_size_;
  Buffer<Op> hidden_, hidden_panels_;
  Buffer<Acc> sum_;
  Buffer<Op> dz_, weight_panels_, turned_;
  Buffer<Acc> dbias_;
  Buffer<Op> panels_, scratches_;
  Buffer<Acc> tiles_;
};

}  // namespace

template <class In, class Op, class Acc>
void backward(const Problem<In, Acc>& problem, const Upstream<In, Acc>& upstream, bool portable) {
  Backward<In, Op, Acc>(problem, upstream, portable).run();
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
