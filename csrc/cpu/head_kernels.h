#pragma once

#include "linear_cross_entropy.h"
#include "linear_rank.h"
#include "retention_mse.h"

namespace teracon {

// One instruction set's operations on heads under hidden states stored as E.
template <class E>
struct HeadKernels {
  // Fills losses [count], the statistics, and the predictions where wanted.
  void (*cross_entropy)(const Head<E>&, const Targets&, const HeadStatistics&, const KeptLogits&, const Predictions&, float* losses);
  void (*cross_entropy_backward)(const Head<E>&, const Targets&, const HeadStatistics&, const KeptLogits&,
                                 const LinearCrossEntropyBackward&);
  // Fills ranks [count]. Returns whether a logit is not a number.
  bool (*rank)(const Head<E>&, const Targets&, int64_t* ranks);
  // The same for the best labels.
  bool (*top)(const Head<E>&, const TopLabels&);
  // coefficient * sum of (student's logit - teacher's logit)^2, and its gradients for the student where wanted.
  double (*retention)(const Head<E>& student, const Head<E>& teacher, float coefficient, const HeadGradients&, const LogitGradients&);
  void (*retention_gram)(const RetentionGram&);
};

// As kernels() of masked_conv.h.
template <class E>
const HeadKernels<E>& head_kernels();

}  // namespace teracon
