#pragma once

#include <cstdint>

namespace teracon {

// Cross-entropy of a linear head; see teracon_fast/ops/linear_cross_entropy.py for the mathematics. All arrays are dense and
// row-major. Labels are taken in blocks, so no array of [rows, labels] is needed.
struct LinearCrossEntropy {
  int64_t rows, labels, channels, count;
  const float* hidden;    // [rows, channels]
  const float* weight;    // [labels, channels]
  const float* bias;      // [labels]
  const int64_t* targets; // [count], labels
  const int64_t* row_of;  // [count], row of each target
  int64_t block;          // labels in a block
  int threads;

  int64_t blocks() const { return (labels + block - 1) / block; }
  // Rows as they are stored: a whole number of register tiles of every instruction set.
  int64_t padded_rows() const { return (rows + 31) / 32 * 32; }
};

// Each row's softmax is exp(logit - maximum) / sum.
struct HeadStatistics {
  float* maximum;  // [rows]
  float* sum;      // [rows]
};

// What forward may keep for backward: exp(logit - highest), where `highest` is that of the labels seen up to this block. Null
// when nothing is kept. The order of `exponentials` is private to the kernels.
struct KeptLogits {
  float* exponentials;  // [labels * padded_rows]
  float* highest;       // [blocks, padded_rows]
};

struct LinearCrossEntropyBackward {
  const float* grad;  // [count], gradient of each target's loss
  float* d_hidden;    // [rows, channels], null when not needed
  float* d_weight;    // [labels, channels], null when not needed
  float* d_bias;      // [labels]
  bool add;           // to what d_weight and d_bias hold
};

// One instruction set's kernels.
struct HeadKernels {
  // Fills losses [count] and the statistics.
  void (*forward)(const LinearCrossEntropy&, const HeadStatistics&, const KeptLogits&, float* losses);
  void (*backward)(const LinearCrossEntropy&, const HeadStatistics&, const KeptLogits&, const LinearCrossEntropyBackward&);
};

extern const HeadKernels kGenericHead;
#if defined(__x86_64__)
extern const HeadKernels kAvx2Head;
extern const HeadKernels kAvx512Head;
#endif

// As kernels() of masked_conv.h.
const HeadKernels& head_kernels();

}  // namespace teracon
