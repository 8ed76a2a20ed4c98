#pragma once

#include <cstdint>

namespace teracon {

// Numbers of one step of Adam, as teracon_fast/optim.py defines them.
struct AdamNumbers {
  float beta1, beta2;
  float rest1, rest2;       // 1 - beta1 and 1 - beta2, rounded once
  float step_size;          // lr / (1 - beta1^t)
  float inverse_root;       // 1 / sqrt(1 - beta2^t)
  float eps;
};

// A parameter with its moments, [rows, channels], and the gradient of some of its rows. All arrays are dense and row-major.
struct AdamRows {
  int64_t rows, channels, count;
  float* parameter;
  float* first;             // mean of gradients
  float* second;            // mean of squared gradients
  const int64_t* with;      // [count], ascending: rows that have a gradient
  const float* gradient;    // [count, channels]
};

// One instruction set's kernels.
struct AdamKernels {
  // Elements with a gradient.
  void (*with_gradient)(const AdamNumbers&, float* parameter, float* first, float* second, const float* gradient,
                        int64_t count);
  // Whole rows whose gradient is zero. `skip`: a row of zero moments, whose parameters do not move, may be left unread.
  void (*without_gradient)(const AdamNumbers&, float* parameter, float* first, float* second, int64_t rows, int64_t channels,
                           bool skip);
};

extern const AdamKernels kGenericAdam;
#if defined(__x86_64__)
extern const AdamKernels kAvx2Adam;
extern const AdamKernels kAvx512Adam;
#endif

// As kernels() of masked_conv.h.
const AdamKernels& adam_kernels();

// One step of every row. Element by element, so results do not depend on the number of threads.
void adam(const AdamRows& op, const AdamNumbers& numbers, int threads);

}  // namespace teracon
