// 128-bit vectors, which every 64-bit processor has.
#define TERACON_ISA generic
#define TERACON_LANES 4
#define TERACON_NV 2
#include "masked_conv_impl.h"

namespace teracon {
const Kernels kGenericKernels = {"generic", generic::forward, generic::backward};
}  // namespace teracon
