// The backward with a filter. Of each row the panels with least softmax mass are left out, as many
// as together hold at most filter_mass of what the row's target does not hold; the forward left the
// mass of every panel. So each panel has a list of rows of its own. Otherwise as the backward of the whole:
//
//   1. dz of a panel's rows, gathered side by side;
//   2. dhidden [M, D] += dz weight, scattered to the rows, and the panel of dweight = dz^T hidden.
//
// A row's list of panels depends on the row alone, and every number is added up by one thread in
// ascending order of panels.
#include "gradient.h"

#include <vector>

namespace mcpo {

namespace {

template <class In, class Op, class Acc>
class Filtered {
 public:
  explicit Filtered(Gradient<In, Op, Acc>& gradient)
      : g_(gradient),
        num_panels_(ceil_div(g_.problem.num_vocab, kColumns)),
        gathered_(at::get_num_threads() * kRows * g_.hidden_stride),
        hidden_panels_(g_.upstream.dweight ? at::get_num_threads() * kTokens * kHidden : 0) {
    select();
    if (g_.upstream.dhidden)
      std::fill(g_.sum.data, g_.sum.data + g_.padded * g_.sum_stride, Acc(0));
  }

  void run() {
    constexpr int64_t kPanels = kSlab<Op> / kColumns;
    for (int64_t p = 0; p < num_panels_; p += kPanels) slab(p, std::min(kPanels, num_panels_ - p));
  }

 private:
  // Rows of M that need panel p, ascending.
  const std::vector<int32_t>& rows_of(int64_t p) const { return rows_[p]; }
  int64_t tiles_of(int64_t p) const { return ceil_div(rows_[p].size(), kRows); }

  void select() {
    std::vector<uint8_t> needed(g_.num_rows * num_panels_);
    at::parallel_for(0, g_.num_rows, 16, [&](int64_t begin, int64_t end) {
      std::vector<Acc> mass(num_panels_), ascending(num_panels_);
      for (int64_t m = begin; m < end; ++m) {
        const int64_t n = g_.upstream.row[m];
        const Acc* panel_lse = g_.upstream.cache.panel_lse + n * num_panels_;
        for (int64_t p = 0; p < num_panels_; ++p)
          mass[p] = std::exp(panel_lse[p] - g_.upstream.lse[n]);
        // Of 1 - p(target), by which a row's gradient is as large as it is. A row whose upstream
        // gradient is no number leaves nothing out, so that it reaches all it should.
        const double spared = std::isfinite(g_.upstream.grad[n])
                                  ? g_.upstream.filter_mass * -std::expm1(g_.upstream.logp[n])
                                  : -1;
        const Acc limit = least_needed(mass, spared, ascending);
        // Nor is a mass that is no number left out.
        for (int64_t p = 0; p < num_panels_; ++p)
          needed[m * num_panels_ + p] = !(mass[p] < limit);
        const int64_t target = g_.problem.target[n];
        if (target >= 0 && target < g_.problem.num_vocab)
          needed[m * num_panels_ + target / kColumns] = 1;
      }
    });
    rows_.resize(num_panels_);
    at::parallel_for(0, num_panels_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t m = 0; m < g_.num_rows; ++m)
        for (int64_t p = begin; p < end; ++p)
          if (needed[m * num_panels_ + p]) rows_[p].push_back(static_cast<int32_t>(m));
    });
  }

  // The least mass that is not left out; all that is below it adds up to at most `spared`.
  static Acc least_needed(const std::vector<Acc>& mass, double spared,
                          std::vector<Acc>& ascending) {
    for (const Acc each : mass)
      if (!std::isfinite(each)) return 0;
    ascending = mass;
    std::sort(ascending.begin(), ascending.end());
    double total = 0;
    for (const Acc each : ascending)
      if (!((total += each) <= spared)) return each;
    return std::numeric_limits<Acc>::infinity();
  }

  void slab(int64_t first_panel, int64_t count) {
    const int64_t groups = groups_for(count, g_.num_tiles);
    each(count * groups, [&](int64_t task, int64_t thread) {
      logit_gradients(first_panel + task / groups, task / groups, task % groups, groups, thread);
      g_.product.release();
    });

    const int64_t block_groups = ceil_div(g_.num_blocks, kBlocks);
    const int64_t num_dhidden = g_.upstream.dhidden ? g_.num_blocks : 0;
    const int64_t num_dweight = g_.upstream.dweight ? count * block_groups : 0;
    each(num_dhidden + num_dweight, [&](int64_t task, int64_t thread) {
      if (task < num_dhidden) {
        add_to_dhidden(first_panel, count, task, thread);
      } else {
        const int64_t p = (task - num_dhidden) / block_groups;
        sum_dweight(first_panel + p, p, (task - num_dhidden) % block_groups, thread);
      }
      g_.product.release();
    });
    if (g_.upstream.dbias)
      for (int64_t p = 0; p < count; ++p)
        g_.write_dbias((first_panel + p) * kColumns, p, tiles_of(first_panel + p));
  }

  Op* dz(int64_t p) { return g_.dz.data + p * g_.padded * kColumns; }
  Op* turned(int64_t p) { return g_.turned.data + p * kColumns * g_.turned_stride; }

  // Step 1 for panel `at` of the vocabulary, p of the slab, and a group of its row tiles.
  void logit_gradients(int64_t at, int64_t p, int64_t group, int64_t groups, int64_t thread) {
    const auto& rows = rows_of(at);
    const int64_t column = at * kColumns, num_tiles = tiles_of(at);
    const int64_t begin = num_tiles * group / groups, end = num_tiles * (group + 1) / groups;
    if (begin == end && (rows.empty() || group > 0)) return;
    Acc* tile = g_.tile(thread);
    g_.pack(column, p, g_.upstream.dhidden && group == 0, thread);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t * kRows, count = std::min<int64_t>(kRows, rows.size() - row);
      const int64_t padded = round_up(count, kRowMultiple);
      const Op* operand = g_.kept(column) ? nullptr : gather(&rows[row], count, padded, thread);
      g_.dz_tile(operand, count, padded, column, [&](int64_t r) { return rows[row + r]; }, thread);
      if (g_.upstream.dbias) g_.sum_columns(tile, count, t, p);
      if (g_.upstream.dhidden)
        for (int64_t r = 0; r < padded; ++r)
          convert(tile + r * kColumns, dz(p) + (row + r) * kColumns, kColumns);
      if (g_.upstream.dweight)
        transpose(tile, padded, kColumns, turned(p) + row, g_.turned_stride,
                  tile + kRows * kColumns);
    }
  }

  const Op* gather(const int32_t* rows, int64_t count, int64_t padded, int64_t thread) {
    Op* to = gathered_.data + thread * kRows * g_.hidden_stride;
    for (int64_t r = 0; r < count; ++r)
      std::copy_n(g_.hidden.data + rows[r] * g_.hidden_stride, g_.inner, to + r * g_.hidden_stride);
    for (int64_t r = count; r < padded; ++r)
      std::fill_n(to + r * g_.hidden_stride, g_.inner, Op(0));
    return to;
  }

  // Step 2: a block of the hidden size of dhidden, over the panels of the slab.
  void add_to_dhidden(int64_t first_panel, int64_t count, int64_t block, int64_t thread) {
    Acc* tile = g_.tile(thread);
    for (int64_t p = 0; p < count; ++p) {
      const auto& rows = rows_of(first_panel + p);
      const int64_t width = g_.width_of((first_panel + p) * kColumns, kColumns);
      for (size_t row = 0; row < rows.size(); row += kRows) {
        const int64_t here = std::min<int64_t>(kRows, rows.size() - row);
        g_.product(round_up(here, kRowMultiple), kHidden, round_up(width, 16),
                   dz(p) + row * kColumns, kColumns, g_.weight_panel(block, p), kHidden, tile,
                   kHidden, false);
        for (int64_t r = 0; r < here; ++r) {
          Acc* to = g_.sum.data + rows[row + r] * g_.sum_stride + block * kHidden;
          for (int64_t c = 0; c < kHidden; ++c) to[c] += tile[r * kHidden + c];
        }
      }
    }
  }

  // Step 2: a panel of dweight, for a group of the blocks of the hidden size.
  void sum_dweight(int64_t at, int64_t p, int64_t group, int64_t thread) {
    const auto& rows = rows_of(at);
    const int64_t count = rows.size(), padded = round_up(count, kRowMultiple);
    const int64_t end = std::min(g_.num_blocks, (group + 1) * kBlocks);
    Acc* tile = g_.tile(thread);
    Op* panel = hidden_panels_.data + thread * kTokens * kHidden;
    if (rows.empty()) std::fill_n(tile, kColumns * kHidden, Acc(0));
    for (int64_t block = group * kBlocks; block < end; ++block) {
      const Op* hidden = g_.hidden.data + block * kHidden;
      for (int64_t k = 0; k < padded; k += kTokens) {
        const int64_t inner = std::min(kTokens, padded - k);
        pack_rows([&](int64_t i) { return hidden + rows[k + i] * g_.hidden_stride; }, count - k,
                  inner, std::min(kHidden, g_.hidden_stride - block * kHidden), panel,
                  g_.scratch(thread));
        g_.product(kColumns, kHidden, inner, turned(p) + k, g_.turned_stride, panel, kHidden, tile,
                   kHidden, k > 0);
      }
      g_.write_dweight(tile, at * kColumns, g_.width_of(at * kColumns, kColumns), block);
    }
  }

  Gradient<In, Op, Acc>& g_;
  const int64_t num_panels_;
  std::vector<std::vector<int32_t>> rows_;
  Buffer<Op> gathered_;       // a tile of rows by thread
  Buffer<Op> hidden_panels_;  // [kTokens, kHidden] by thread
};

}  // namespace

template <class In, class Op, class Acc>
void backward_filtered(Gradient<In, Op, Acc>& gradient) {
  Filtered<In, Op, Acc>(gradient).run();
}

template void backward_filtered(Gradient<at::BFloat16, at::BFloat16, float>&);
template void backward_filtered(Gradient<at::BFloat16, float, float>&);
template void backward_filtered(Gradient<at::Half, float, float>&);
template void backward_filtered(Gradient<float, float, float>&);
template void backward_filtered(Gradient<double, double, double>&);

}  // namespace mcpo
