// Declares ranking with heads to the dispatcher; see csrc/cpu/linear_rank.h.
//
// Everything that determines where the kernels read or write is checked here: no input leads out of bounds.

#include <torch/csrc/stable/library.h>

#include "cpu/head_kernels.h"
#include "head_checks.h"

namespace {

using namespace head_checks;

bool rank(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int64_t block, int64_t threads, Tensor ranks) {
  constexpr char kName[] = "linear_rank";
  bool nan = false;
  with_element(hidden, [&](auto element) {
    using E = decltype(element);
    const teracon::Head<E> op = head<E>(kName, hidden, weight, bias, block, threads);
    const teracon::Targets asked = targets_of(kName, op, targets, row_of);
    nan = teracon::head_kernels<E>().rank(op, asked, checked<int64_t>(kName, ranks, ScalarType::Long, asked.count, "ranks"));
  });
  return nan;
}

// An empty `offsets`: no excluded labels.
bool topk(Tensor hidden, Tensor weight, Tensor bias, Tensor excluded, Tensor offsets, int64_t block, int64_t threads, Tensor scores,
          Tensor labels) {
  constexpr char kName[] = "linear_topk";
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) >= 1, kName, ": expected scores [R, k], k at least 1");
  bool nan = false;
  with_element(hidden, [&](auto element) {
    using E = decltype(element);
    const teracon::Head<E> op = head<E>(kName, hidden, weight, bias, block, threads);
    teracon::TopLabels top{};
    top.k = scores.size(1);
    STD_TORCH_CHECK(top.k <= op.labels, kName, ": k is ", top.k, ", expected 1..", op.labels);
    top.scores = floats(kName, scores, op.rows * top.k, "scores");
    top.labels = checked<int64_t>(kName, labels, ScalarType::Long, op.rows * top.k, "labels");
    if (offsets.numel() != 0) {
      top.excluded = numbers(kName, excluded, excluded.numel(), op.labels, "exclude");
      top.excluded_offsets = numbers(kName, offsets, op.rows + 1, excluded.numel() + 1, "offsets");
      STD_TORCH_CHECK(top.excluded_offsets[0] == 0 && top.excluded_offsets[op.rows] == excluded.numel(), kName,
                      ": offsets do not cover the excluded labels");
      for (int64_t row = 0; row < op.rows; ++row) {
        const int64_t begin = top.excluded_offsets[row], end = top.excluded_offsets[row + 1];
        STD_TORCH_CHECK(begin <= end, kName, ": offsets of row ", row, " are out of order");
        for (int64_t i = begin + 1; i < end; ++i) {
          STD_TORCH_CHECK(top.excluded[i - 1] <= top.excluded[i], kName, ": excluded labels of row ", row, " are out of order");
        }
      }
    }
    nan = teracon::head_kernels<E>().top(op, top);
  });
  return nan;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def(
      "linear_rank_cpu(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int block, int threads, "
      "Tensor(a!) ranks) -> bool");
  m.def(
      "linear_topk_cpu(Tensor hidden, Tensor weight, Tensor bias, Tensor excluded, Tensor offsets, int block, int threads, "
      "Tensor(a!) scores, Tensor(b!) labels) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("linear_rank_cpu", TORCH_BOX(&rank));
  m.impl("linear_topk_cpu", TORCH_BOX(&topk));
}
