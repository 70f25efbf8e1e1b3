// The fused head: what forward and backward share.
//
// N scored tokens, M of them with gradient, D hidden, V vocabulary.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/native/CPUBlas.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mcpo {

// A tile of logits is kRows by kColumns: with its panel of the weight it stays in the caches.
constexpr int64_t kRows = 128;
constexpr int64_t kColumns = 64;
// Columns of the vocabulary between two looks of the backward at dhidden: the more, the fewer.
template <class Op>
constexpr int64_t kSlab = sizeof(Op) == 2 ? 1024 : 384;
// Columns of the hidden size, and tokens, that one product of the backward takes; rows of dweight.
constexpr int64_t kHidden = 64;
constexpr int64_t kTokens = 512;
constexpr int64_t kWeightRows = 128;
// Blocks of the hidden size for which a task of the backward holds its left operand.
constexpr int64_t kBlocks = 8;
// Parts of the vocabulary that the forward sums by themselves, whatever the number of threads.
constexpr int64_t kParts = 64;
// Rows of operands are padded with zeros to a multiple of this.
constexpr int64_t kRowMultiple = 32;

template <class Acc>
struct Head {
  const Acc* bias;  // [V], or null
  Acc softcap;      // 0 for none
  Acc scale;
};

template <class In, class Acc>
struct Problem {
  const In* hidden;  // [N, D]
  int64_t hidden_stride;
  const In* weight;  // [V, D]
  int64_t weight_stride;
  const int64_t* target;  // [N]
  int64_t num_tokens, num_hidden, num_vocab;
  Head<Acc> head;
};

// What the forward leaves for the backward if asked. The two know panels of kColumns columns.
template <class Acc>
struct Cache {
  Acc* logits;         // [num_panels, N, kColumns] of the first panels, with bias, scale and cap
  int64_t num_panels;  // 0 for none
  Acc* panel_lse;      // [N, panels], the log-sum-exp of each panel alone; null for none
};

// What the backward is given besides, all for the M kept rows alone.
template <class In, class Acc>
struct Upstream {
  const int64_t* row;  // [M] of N, ascending
  int64_t num_rows;
  const Acc* grad;  // [N]
  const Acc* logp;  // [N]
  const Acc* lse;   // [N]
  Cache<Acc> cache;
  double filter_mass;  // with panel_lse: how much of 1 - p(target) a row may leave out
  In* dhidden;      // [N, D], zero; null where not needed
  In* dweight;      // [V, D]; null where not needed
  In* dbias;        // [V]; null where not needed
};

// What the columns at hand say of each row, all [N]. A target that is none of them leaves 0.
template <class Acc>
struct Partial {
  Acc* maximum;
  Acc* sum;  // of exp(z - maximum)
  Acc* target_logit;
};

// Op is the type of the operands of the products; `portable` asks for the products of vector.inc
// instead of oneDNN's.
template <class In, class Op, class Acc>
void forward(const Problem<In, Acc>& problem, const Cache<Acc>& cache, const Partial<Acc>& result,
             bool portable);

template <class In, class Op, class Acc>
void backward(const Problem<In, Acc>& problem, const Upstream<In, Acc>& upstream, bool portable);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kLargePage = int64_t{1} << 21;

// Asks for large pages: fresh memory is paid for by the page, and ours is written whole.
inline void use_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const auto begin = round_up(reinterpret_cast<int64_t>(data), kLargePage);
  const auto end = (reinterpret_cast<int64_t>(data) + bytes) / kLargePage * kLargePage;
  // Advice: where it is refused, pages are small.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void use_large_pages(const at::Tensor& fresh) {
  use_large_pages(fresh.data_ptr(), static_cast<int64_t>(fresh.nbytes()));
}

// Uninitialised memory, aligned for vectors.
template <class T>
struct Buffer {
  explicit Buffer(int64_t count)
      : bytes(at::empty({count * static_cast<int64_t>(sizeof(T)) + 64}, at::kByte)) {
    const auto address = reinterpret_cast<uintptr_t>(bytes.data_ptr());
    data = reinterpret_cast<T*>(static_cast<uintptr_t>(round_up(address, 64)));
    use_large_pages(bytes);
  }
  at::Tensor bytes;
  T* data;
};

// work(task, thread) for every task, each taken by the next free thread: which thread runs a task
// changes no result.
template <class Work>
void each(int64_t num_tasks, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(num_tasks, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const int64_t thread = at::get_thread_num();
    for (int64_t task = next++; task < num_tasks; task = next++) work(task, thread);
  });
}

// In how many groups to cut `items` so that `tasks` times as many keep all threads busy.
inline int64_t groups_for(int64_t tasks, int64_t items) {
  return std::clamp<int64_t>(ceil_div(4 * at::get_num_threads(), tasks), 1, std::max<int64_t>(items, 1));
}

}  // namespace mcpo
