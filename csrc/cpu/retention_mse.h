#pragma once

#include "head.h"

namespace teracon {

// The squared distance between the logits of two heads of equal shape; see teracon_fast/ops/retention_mse/api.py.

// Where the gradients of the student's logits go, [labels, rows], null where not wanted: with the hidden states they make d(weight).
struct LogitGradients {
  float* to;
};

// Both heads' matrices in one, for the form without logits: M = [Ws - Wt, bs - bt, Wt], so that a row's differences are
// M z with z = [hs, 1, hs - ht].
struct RetentionGram {
  int64_t labels, channels, block;
  int threads;
  Matrix student, teacher;          // [labels, channels]
  const float *student_bias, *teacher_bias;
  const float* moments;             // [2 * channels + 1, channels]: d(Ws) = M @ moments; null when not wanted
  const float* bias_moments;        // [2 * channels + 1]: d(bs) = M @ bias_moments
  bool teacher_known;               // leaves out the part of M^T M that is Wt^T Wt
  double* gram;                     // [2 * channels + 1, 2 * channels + 1]: M^T M on and above the diagonal
  MutableMatrix d_weight;           // [labels, channels]
  float* d_bias;                    // [labels]

  int64_t width() const { return 2 * channels + 1; }
};

}  // namespace teracon
