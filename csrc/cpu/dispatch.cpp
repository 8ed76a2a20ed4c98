// Chooses the instruction set once, at the first call.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "adam.h"
#include "masked_conv.h"

namespace teracon {
namespace {

// Best last.
struct InstructionSet {
  const char* name;
  bool present, preferred;
  const Kernels<float>* fp32;
  const Kernels<Bf16>* bf16;
  const AdamKernels* adam;
};

const InstructionSet& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Measured on Emerald Rapids: products of bf16 pairs run at half the rate of float32 multiply-adds, so Intel's processors,
  // which keep their bf16 speed for AMX, are faster with bf16 as a format of storage.
  const bool dot_is_faster = !__builtin_cpu_is("intel");
#endif
  static const InstructionSet sets[] = {
      {"generic", true, true, &kGenericFloat, &kGenericBf16, &kGenericAdam},
#if defined(__x86_64__)
      {"avx2", avx2, true, &kAvx2Float, &kAvx2Bf16, &kAvx2Adam},
      {"avx512", avx512, true, &kAvx512Float, &kAvx512Bf16, &kAvx512Adam},
      {"avx512_bf16", avx512_bf16, dot_is_faster, &kAvx512Float, &kAvx512Bf16Dot, &kAvx512Adam},
#endif
  };
  const char* given = std::getenv("TERACON_CPU_ISA");
  const char* trusted = std::getenv("TERACON_CPU_ISA_UNCHECKED");
  const bool unchecked = trusted != nullptr && std::string(trusted) == "1";
  const std::string wanted = given == nullptr ? "" : given;
  const InstructionSet *best = nullptr, *named = nullptr;
  std::string known;
  for (const InstructionSet& set : sets) {
    const bool usable = set.present || (unchecked && wanted == set.name);
    if (!usable) continue;
    if (set.preferred) best = &set;
    if (wanted == set.name) named = &set;
    known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  if (wanted.empty()) return *best;
  if (named == nullptr) {
    throw std::runtime_error("TERACON_CPU_ISA is '" + wanted + "', expected one that this machine has: " + known);
  }
  return *named;
}

const InstructionSet& chosen() {
  static const InstructionSet& set = choose();
  return set;
}

}  // namespace

template <>
const Kernels<float>& kernels() {
  return *chosen().fp32;
}

template <>
const Kernels<Bf16>& kernels() {
  return *chosen().bf16;
}

template <>
const HeadKernels<float>& head_kernels() {
  return kernels<float>().head;
}

template <>
const HeadKernels<Bf16>& head_kernels() {
  return kernels<Bf16>().head;
}

const AdamKernels& adam_kernels() { return *chosen().adam; }

const char* cpu_isa() { return chosen().name; }

}  // namespace teracon
