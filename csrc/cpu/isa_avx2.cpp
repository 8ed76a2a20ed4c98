#if defined(__x86_64__)

#include "isa_begin.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define TERACON_ISA avx2
#define TERACON_LANES 8
#define TERACON_NV 2
#define TERACON_MR 6
#define TERACON_OR 4
#include "kernels_impl.h"
#include "adam_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace teracon {
constexpr Kernels<float> kAvx2Float = avx2::table<float>("avx2");
constexpr Kernels<Bf16> kAvx2Bf16 = avx2::table<Bf16>("avx2");
constexpr AdamKernels kAvx2Adam = {avx2::adam_with_gradient, avx2::adam_without_gradient};
}  // namespace teracon

#endif
