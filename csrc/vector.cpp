// Which of the compiled loops this processor runs. Free of torch, so that the loops can be compiled
// and tested where there is none.
#include "vector.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mcpo {

std::vector<const Vector*> runnable() {
  std::vector<const Vector*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&k_avx512);
  if (wide) found.push_back(&k_avx2);
#endif
  found.push_back(&k_baseline);
  return found;
}

namespace {

const Vector& choose() {
  const std::vector<const Vector*> found = runnable();
  const char* given = std::getenv("MCPO_CPU_CAPABILITY");
  const std::string wanted = given ? given : "";
  if (wanted.empty()) return *found.front();
  std::string names;
  for (const Vector* each : found) {
    if (wanted == each->name) return *each;
    names += std::string(names.empty() ? "" : ", ") + each->name;
  }
  throw std::runtime_error("MCPO_CPU_CAPABILITY must name loops that this processor runs (" +
                           names + "), got '" + wanted + "'; unset it for the widest");
}

}  // namespace

const Vector& vector() {
  static const Vector& chosen = choose();
  return chosen;
}

}  // namespace mcpo
