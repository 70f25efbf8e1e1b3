// The loops of vector.inc for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "vector.h"

namespace {
// Sums kept in registers by the portable product.
constexpr int kRowsAtOnce = 6, kVectorsAtOnce = 4;
}  // namespace

#include "vector.inc"

namespace mcpo {

extern const Vector k_avx512;
const Vector k_avx512 = {"avx512", transpose, interleave, round,
                         finish,   fold,      dlogits,    multiply};

}  // namespace mcpo

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
