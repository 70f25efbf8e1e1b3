// The loops of vector.inc for AVX2 and FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "vector.h"

namespace {
// Sums kept in registers by the portable product.
constexpr int kRowsAtOnce = 3, kVectorsAtOnce = 2;
}  // namespace

#include "vector.inc"

namespace mcpo {

extern const Vector k_avx2;
const Vector k_avx2 = {"avx2", transpose, interleave, round,
                         finish,   fold,      dlogits,    multiply};

}  // namespace mcpo

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
