// Operands as the products want them, and the products. A panel is the right operand: columns side
// by side, and for 16-bit operands two rows of the inner dimension interleaved, as dot-product
// instructions read them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include "head.h"
#include "vector.h"

namespace mcpo {

template <class Op>
constexpr int64_t kPair = sizeof(Op) == 2 ? 2 : 1;

// Multiple of the inner dimension. MKL adds up unaligned rows of doubles in another way than others.
template <class Op>
constexpr int64_t kInner = sizeof(Op) == 8 ? 16 : kPair<Op>;

inline at::Tensor view(const double* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<double*>(data), {rows, columns}, {stride, 1}, at::kDouble);
}

// c = a panel, or c += a panel, added up in Acc.
template <class Op>
struct Product {
  bool portable;

  template <class Acc>
  void operator()(int64_t rows, int64_t columns, int64_t inner, const Op* a, int64_t a_stride,
                  const Op* panel, int64_t panel_columns, Acc* c, int64_t c_stride,
                  bool add) const {
    if constexpr (std::is_same_v<Op, double>) {
      const at::Tensor left = view(a, rows, inner, a_stride);
      const at::Tensor right = view(panel, inner, columns, panel_columns);
      at::Tensor result = view(c, rows, columns, c_stride);
      if (add)
        result.addmm_(left, right);
      else
        at::mm_out(result, left, right);
    } else {
      if constexpr (std::is_same_v<Op, float>) {
        if (portable) {
          vector().multiply(rows, columns, inner, a, a_stride, panel, panel_columns, c, c_stride,
                            add);
          return;
        }
      }
      at::native::cpublas::brgemm(rows, columns, inner, a_stride, panel_columns, c_stride, add, a,
                                  panel, c, kPair<Op> == 2);
    }
  }

  // Gives the processor's matrix unit back, where there is one. By each thread that multiplied.
  void release() const {
    if constexpr (!std::is_same_v<Op, double>)
      if (!portable) at::native::cpublas::brgemm_release(kPair<Op> == 2);
  }
};

// Rows in the type of the operands, zeros up to `columns`.
template <class In, class Op>
void copy_row(const In* from, int64_t count, Op* to, int64_t columns) {
  if constexpr (std::is_same_v<In, Op>)
    std::memcpy(to, from, count * sizeof(In));
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Op>(from[i]);
  std::fill(to + count, to + columns, Op(0));
}

// Panel [inner, kColumns] of the transpose of weight rows [width, inner]; zeros where width ends.
// `scratch` holds 16 rows in the type of the operands.
template <class In, class Op>
void pack_transposed(const In* weight, int64_t stride, int64_t width, int64_t inner, Op* panel,
                     Op* scratch) {
  const int64_t padded = round_up(inner, kInner<Op>);
  if (width < kColumns || padded > inner) std::fill(panel, panel + padded * kColumns, Op(0));
  if constexpr (std::is_same_v<Op, double>) {
    for (int64_t v = 0; v < width; ++v)
      for (int64_t k = 0; k < inner; ++k) panel[k * kColumns + v] = weight[v * stride + k];
  } else {
    auto* to = reinterpret_cast<uint32_t*>(panel);
    const int64_t lanes = padded / kPair<Op>;
    if (std::is_same_v<In, Op> && padded == inner) {
      vector().transpose(weight, stride * sizeof(In), to, kColumns, width, lanes);
      return;
    }
    for (int64_t v = 0; v < width; v += 16) {
      const int64_t rows = std::min<int64_t>(16, width - v);
      for (int64_t r = 0; r < rows; ++r)
        copy_row(weight + (v + r) * stride, inner, scratch + r * padded, padded);
      vector().transpose(scratch, padded * sizeof(Op), to + v, kColumns, rows, lanes);
    }
  }
}

// Panel [inner_padded, kHidden] of `columns` columns of the rows row(0) to row(inner - 1); zeros
// outside. `scratch` holds two rows of kHidden in the type of the operands.
template <class Row, class Op>
void pack_rows(const Row& row, int64_t inner, int64_t inner_padded, int64_t columns, Op* panel,
               Op* scratch) {
  const auto copy = [&](int64_t k, Op* to) {
    if (k < inner)
      copy_row(row(k), columns, to, kHidden);
    else
      std::fill(to, to + kHidden, Op(0));
  };
  for (int64_t k = 0; k < inner_padded; k += kPair<Op>) {
    if constexpr (kPair<Op> == 1) {
      copy(k, panel + k * kHidden);
    } else {
      for (int64_t p = 0; p < 2; ++p) copy(k + p, scratch + p * kHidden);
      vector().interleave(reinterpret_cast<uint16_t*>(scratch),
                          reinterpret_cast<uint16_t*>(scratch + kHidden),
                          reinterpret_cast<uint32_t*>(panel + k * kHidden), kHidden);
    }
  }
}

// Rows `row` of hidden in the type of the operands, [padded, stride], zeros outside.
template <class In, class Op>
void gather_rows(const In* from, int64_t from_stride, const int64_t* row, int64_t count,
                 int64_t columns, Op* to, int64_t stride, int64_t padded) {
  at::parallel_for(0, padded, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t source = r < count ? (row ? row[r] : r) : 0;
      copy_row(from + source * from_stride, r < count ? columns : 0, to + r * stride, stride);
    }
  });
}

// Row operations on logits: vectors for float, plain loops for double.

inline void finish(float* z, const float* bias, int64_t count, const Head<float>& head) {
  if (bias || head.softcap > 0 || head.scale != 1)
    vector().finish(z, bias, count, head.scale, head.softcap);
}

inline void finish(double* z, const double* bias, int64_t count, const Head<double>& head) {
  for (int64_t i = 0; i < count; ++i) {
    z[i] = head.scale * (z[i] + (bias ? bias[i] : 0.0));
    if (head.softcap > 0) z[i] = head.softcap * std::tanh(z[i] / head.softcap);
  }
}

// Returns what it added to the sum.
inline float fold(const float* z, int64_t count, float* maximum, float* sum) {
  return vector().fold(z, count, maximum, sum);
}

inline double fold(const double* z, int64_t count, double* maximum, double* sum) {
  const double old = *maximum;
  for (int64_t i = 0; i < count; ++i) *maximum = z[i] > *maximum ? z[i] : *maximum;
  const double shift = std::isinf(*maximum) && *maximum < 0 ? 0.0 : *maximum;
  if (*maximum != old) *sum *= std::exp(old - *maximum);
  double added = 0;
  for (int64_t i = 0; i < count; ++i) added += std::exp(z[i] - shift);
  *sum += added;
  return added;
}

inline void dlogits(float* z, int64_t count, float lse, float grad, const Head<float>& head) {
  vector().dlogits(z, count, lse, grad, head.scale, head.softcap);
}

inline void dlogits(double* z, int64_t count, double lse, double grad, const Head<double>& head) {
  for (int64_t i = 0; i < count; ++i) {
    const double slope = head.softcap > 0 ? 1 - std::pow(z[i] / head.softcap, 2) : 1.0;
    z[i] = -grad * std::exp(z[i] - lse) * slope * head.scale;
  }
}

// From the accumulation type to that of an operand or a result.
template <class To, class Acc>
void convert(const Acc* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<To, Acc>) {
    std::memcpy(to, from, count * sizeof(To));
  } else if constexpr (std::is_same_v<To, at::BFloat16>) {
    const int64_t whole = count / 16 * 16;
    vector().round(from, reinterpret_cast<uint16_t*>(to), whole);
    for (int64_t i = whole; i < count; ++i) to[i] = static_cast<To>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
  }
}

// to[c][r] = from[r][c], in the type of the operands; `scratch` holds rows * columns numbers.
template <class Op, class Acc>
void transpose(const Acc* from, int64_t rows, int64_t columns, Op* to, int64_t to_stride,
               Acc* scratch) {
  if constexpr (std::is_same_v<Acc, double>) {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * columns + c];
  } else if constexpr (std::is_same_v<Op, float>) {
    vector().transpose(from, columns * sizeof(float), reinterpret_cast<uint32_t*>(to), to_stride,
                       rows, columns);
  } else {
    vector().transpose(from, columns * sizeof(float), reinterpret_cast<uint32_t*>(scratch), rows,
                       rows, columns);
    for (int64_t c = 0; c < columns; ++c) convert(scratch + c * rows, to + c * to_stride, rows);
  }
}

}  // namespace mcpo
