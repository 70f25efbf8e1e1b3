// Which of the compiled loops this processor runs.
#include "vector.h"

namespace mcpo {

extern const Vector k_baseline;
#if defined(__x86_64__)
extern const Vector k_avx2;
extern const Vector k_avx512;
#endif

namespace {

const Vector& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return k_avx512;
  if (wide) return k_avx2;
#endif
  return k_baseline;
}

}  // namespace

const Vector& vector() {
  static const Vector& chosen = choose();
  return chosen;
}

}  // namespace mcpo
