// Chooses the instruction set once, at the first call.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "masked_conv.h"

namespace teracon {
namespace {

const Kernels& choose() {
  const char* given = std::getenv("TERACON_CPU_ISA");
  const std::string wanted = given == nullptr ? "" : given;
  std::string known = "generic";
  const Kernels* best = &kGenericKernels;
  const Kernels* named = wanted == kGenericKernels.name ? best : nullptr;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const struct {
    bool present;
    const Kernels& kernels;
  } sets[] = {{avx2, kAvx2Kernels}, {avx512, kAvx512Kernels}};
  for (const auto& set : sets) {
    if (!set.present) continue;
    best = &set.kernels;
    known = known + ", " + set.kernels.name;
    if (wanted == set.kernels.name) named = best;
  }
#endif
  if (wanted.empty()) return *best;
  if (named == nullptr) {
    throw std::runtime_error("TERACON_CPU_ISA is '" + wanted + "', expected one that this machine has: " + known);
  }
  return *named;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace teracon
