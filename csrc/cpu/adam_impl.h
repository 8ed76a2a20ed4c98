// Adam for one instruction set. Included by isa_*.cpp; the loops are plain, the compiler makes vectors of them.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

static inline void adam_move(const AdamNumbers& n, float first, float second, float* parameter) {
  *parameter -= n.step_size * first / (__builtin_sqrtf(second) * n.inverse_root + n.eps);
}

static void adam_with_gradient(const AdamNumbers& numbers, float* __restrict parameter, float* __restrict first,
                               float* __restrict second, const float* __restrict gradient, int64_t count) {
  const AdamNumbers n = numbers;
  for (int64_t i = 0; i < count; ++i) {
    const float g = gradient[i];
    first[i] = first[i] * n.beta1 + g * n.rest1;
    second[i] = second[i] * n.beta2 + g * g * n.rest2;
    adam_move(n, first[i], second[i], parameter + i);
  }
}

static inline bool all_zero(const float* values, int64_t count) {
  constexpr int64_t kBlock = 64;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    int other = 0;
    for (int64_t j = 0; j < kBlock; ++j) other |= values[i + j] != 0.0f;
    if (other) return false;
  }
  for (; i < count; ++i) {
    if (values[i] != 0.0f) return false;
  }
  return true;
}

static void adam_without_gradient(const AdamNumbers& numbers, float* __restrict parameter, float* __restrict first,
                                  float* __restrict second, int64_t rows, int64_t channels, bool skip) {
  const AdamNumbers n = numbers;
  for (int64_t row = 0; row < rows; ++row, parameter += channels, first += channels, second += channels) {
    if (skip && all_zero(first, channels)) {
      if (all_zero(second, channels)) continue;
      for (int64_t i = 0; i < channels; ++i) second[i] *= n.beta2;
      continue;
    }
    for (int64_t i = 0; i < channels; ++i) {
      first[i] *= n.beta1;
      second[i] *= n.beta2;
      adam_move(n, first[i], second[i], parameter + i);
    }
  }
}

}  // namespace TERACON_ISA
}  // namespace teracon
