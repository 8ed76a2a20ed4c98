// All kernels of one instruction set that depend on how activations are stored, and the table of them. Included by isa_*.cpp.

#include "masked_conv_impl.h"
#include "head_impl.h"
#include "linear_rank_impl.h"
#include "linear_cross_entropy_impl.h"
#include "retention_mse_impl.h"

namespace teracon {
namespace TERACON_ISA {

template <class E>
static constexpr Kernels<E> table(const char* name) {
  return {name, forward<E>, backward<E>, encoder_words<E>, encoder_pack<E>, encode<E>,
          {cross_entropy<E>, cross_entropy_backward<E>, rank<E>, top<E>, retention<E>, retention_gram}};
}

}  // namespace TERACON_ISA
}  // namespace teracon
