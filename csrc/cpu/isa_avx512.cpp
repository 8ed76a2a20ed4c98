#if defined(__x86_64__)

#include "isa_begin.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")
#endif

#define TERACON_ISA avx512
#define TERACON_LANES 16
#define TERACON_NV 2
#define TERACON_MR 14
#define TERACON_OR 8
#include "kernels_impl.h"
#include "adam_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace teracon {
constexpr Kernels<float> kAvx512Float = avx512::table<float>("avx512");
constexpr Kernels<Bf16> kAvx512Bf16 = avx512::table<Bf16>("avx512");
constexpr AdamKernels kAvx512Adam = {avx512::adam_with_gradient, avx512::adam_without_gradient};
}  // namespace teracon

#endif
