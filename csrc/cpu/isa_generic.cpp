// 128-bit vectors, which every 64-bit processor has.
#define TERACON_ISA generic
#define TERACON_LANES 4
#define TERACON_NV 2
#define TERACON_MR 6
#define TERACON_OR 4
#include "kernels_impl.h"
#include "adam_impl.h"

namespace teracon {
constexpr Kernels<float> kGenericFloat = generic::table<float>("generic");
constexpr Kernels<Bf16> kGenericBf16 = generic::table<Bf16>("generic");
constexpr AdamKernels kGenericAdam = {generic::adam_with_gradient, generic::adam_without_gradient};
}  // namespace teracon
