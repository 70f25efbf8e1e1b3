// Loops over float32 tiles, compiled once per instruction set and chosen when the library loads.
#pragma once

#include <cstdint>
#include <vector>

namespace mcpo {

// Row lengths are multiples of 16 unless a comment says otherwise.
struct Vector {
  const char* name;
  // to[c * to_stride + r] = from[r][c]: 32-bit lanes, any numbers of rows and columns.
  void (*transpose)(const void* from, int64_t from_bytes, uint32_t* to, int64_t to_stride,
                    int64_t rows, int64_t columns);
  // to[i] holds even[i] in its low and odd[i] in its high half; any count.
  void (*interleave)(const uint16_t* even, const uint16_t* odd, uint32_t* to, int64_t count);
  // To bfloat16, nearest even.
  void (*round)(const float* from, uint16_t* to, int64_t count);
  // z = softcap(scale * (z + bias)); bias may be null, cap is 0 where there is none.
  void (*finish)(float* z, const float* bias, int64_t count, float scale, float cap);
  // Folds a row of logits into its running maximum and its running sum of exp(z - maximum), and
  // returns what it added to the sum.
  float (*fold)(const float* z, int64_t count, float* maximum, float* sum);
  // z = -grad * exp(z - lse) * (1 - (z / cap)^2) * scale
  void (*dlogits)(float* z, int64_t count, float lse, float grad, float scale, float cap);
  // c = a b, or c += a b: a [rows, inner], b [inner, columns], columns any multiple of 16.
  void (*multiply)(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t a_stride,
                   const float* b, int64_t b_stride, float* c, int64_t c_stride, bool add);
};

// Each defined in a file of its own, the first two for x86-64 alone.
extern const Vector k_avx512, k_avx2, k_baseline;

// Those that this processor runs, the widest first.
std::vector<const Vector*> runnable();

// The widest, or the one that MCPO_CPU_CAPABILITY names.
// Throws std::runtime_error where that names none of `runnable()`.
const Vector& vector();

}  // namespace mcpo
