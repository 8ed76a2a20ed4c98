#pragma once

#include "head.h"

namespace teracon {

// Cross-entropy of a linear head; see teracon_fast/ops/linear_cross_entropy/api.py for the mathematics.

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

// Predictions, null when not wanted. Ranks as linear_rank.h.
struct Predictions {
  int64_t* best;  // [rows], the lowest of the labels with the highest logit
  int64_t* rank;  // [count]
};

struct LinearCrossEntropyBackward {
  const float* grad;  // [count], gradient of each target's loss
  float negligible;   // tiles of probabilities below it are left out; 0: none are
  HeadGradients gradients;
};

}  // namespace teracon
