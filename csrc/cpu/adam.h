#pragma once

#include <cstdint>

namespace teracon {

// What is the same in every step, as torch's fused Adam rounds it.
struct AdamNumbers {
  float rest1;         // 1 - beta1
  float beta2, rest2;  // rest2 = 1 - beta2
  float eps;
};

// What each step has of its own.
struct AdamStep {
  float minus_step_size;  // -lr / (1 - beta1^t)
  float root;             // sqrt(1 - beta2^t)
  // 1 / root as the sum of two floats. x * high + x * low, with one fused multiply-add, is x / root to the bit for every finite x;
  // `low` is NaN where that is not proven.
  float high, low;
};

AdamStep adam_step(double step_size, double root);

// Steps that a row may have missed. `growing`: ascending, those whose update without a gradient may be larger than the one before.
struct AdamHistory {
  const AdamStep* steps;
  const int64_t* growing;
  int64_t num_growing;
};

// A parameter with its moments, [rows, channels], dense and row-major.
struct AdamArrays {
  int64_t rows, channels;
  float* parameter;
  float* first;   // mean of gradients
  float* second;  // mean of squared gradients
};

// The gradient of some rows. `tail`: so many elements at the end of the parameter are no whole vector of torch's kernel, whose loop
// over single elements rounds in another order.
struct AdamGradient {
  int64_t count;
  const int64_t* rows;  // [count], ascending
  const float* values;  // [count, channels]
  int64_t tail;
};

// One instruction set's kernels.
struct AdamKernels {
  // A step of elements with a gradient, the last `tail` of them in the order of single elements.
  void (*with_gradient)(const AdamNumbers&, const AdamStep&, float* parameter, float* first, float* second,
                        const float* gradient, int64_t count, int64_t tail);
  // Steps of elements without a gradient. Once an update has changed nothing, those behind it are taken to change nothing either.
  void (*without_gradient)(const AdamNumbers&, const AdamStep*, int64_t num_steps, float* parameter, float* first, float* second,
                           int64_t count);
};

extern const AdamKernels kGenericAdam;
#if defined(__x86_64__)
extern const AdamKernels kAvx2Adam;
extern const AdamKernels kAvx512Adam;
#endif

// As kernels() of masked_conv.h.
const AdamKernels& adam_kernels();

// All of these work element by element, so results do not depend on the number of threads.

// One step of every row.
void adam(const AdamArrays& arrays, const AdamGradient& gradient, const AdamNumbers& numbers, const AdamStep& step, int threads);

// Rows keep `last`, the number of steps that they have taken; -1: moments are zero, so that no step without gradient changes the
// row. Brings rows to the end of `to` steps: those of `items` that exist, in any order and repeated, or all rows where it is null.
// Returns how many were behind, or -1, having done nothing, where `last` holds what no row can have.
int64_t adam_catch_up(const AdamArrays& arrays, int32_t* last, const int64_t* items, int64_t count, const AdamNumbers& numbers,
                      const AdamHistory& history, int64_t to, int threads);

// Takes the last of `to` steps with a gradient, and before it what its rows have missed. Returns false as above.
bool adam_deferred(const AdamArrays& arrays, int32_t* last, const AdamGradient& gradient, const AdamNumbers& numbers,
                   const AdamHistory& history, int64_t to, int threads);

}  // namespace teracon
