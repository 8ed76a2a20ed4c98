// Declares the cross-entropy of heads to the dispatcher; see csrc/cpu/linear_cross_entropy.h.
//
// Everything that determines where the kernels read or write is checked here: no input leads out of bounds.

#include <torch/csrc/stable/library.h>

#include "cpu/head_kernels.h"
#include "head_checks.h"

namespace {

using namespace head_checks;

constexpr char kName[] = "linear_cross_entropy";

template <class E>
teracon::HeadStatistics statistics_of(const teracon::Head<E>& op, const Tensor& statistics) {
  float* values = floats(kName, statistics, 2 * op.rows, "statistics");
  return {values, values + op.rows};
}

// An empty tensor: nothing kept, or no gradient wanted.
template <class E>
teracon::KeptLogits kept_of(const teracon::Head<E>& op, const Tensor& exponentials, const Tensor& highest) {
  if (exponentials.numel() == 0) return {nullptr, nullptr};
  return {floats(kName, exponentials, op.labels * op.padded_rows(), "exponentials"),
          floats(kName, highest, op.blocks() * op.padded_rows(), "highest")};
}

void forward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int64_t block, int64_t threads,
             Tensor losses, Tensor statistics, Tensor exponentials, Tensor highest, Tensor best, Tensor rank) {
  with_element(hidden, [&](auto element) {
    using E = decltype(element);
    const teracon::Head<E> op = head<E>(kName, hidden, weight, bias, block, threads);
    const teracon::Targets asked = targets_of(kName, op, targets, row_of);
    teracon::Predictions predictions{nullptr, nullptr};
    if (best.numel() != 0 || rank.numel() != 0) {
      predictions = {checked<int64_t>(kName, best, ScalarType::Long, op.rows, "argmax"),
                     checked<int64_t>(kName, rank, ScalarType::Long, asked.count, "rank")};
    }
    const teracon::KeptLogits kept = kept_of(op, exponentials, highest);
    if (kept.exponentials != nullptr) teracon::prefer_large_pages(kept.exponentials, 4 * exponentials.numel());
    teracon::head_kernels<E>().cross_entropy(op, asked, statistics_of(op, statistics), kept, predictions,
                                             floats(kName, losses, asked.count, "losses"));
  });
}

void backward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int64_t block, int64_t threads,
              Tensor statistics, Tensor exponentials, Tensor highest, Tensor grad, bool add, double negligible, Tensor d_hidden,
              Tensor d_weight, Tensor d_bias) {
  with_element(hidden, [&](auto element) {
    using E = decltype(element);
    const teracon::Head<E> op = head<E>(kName, hidden, weight, bias, block, threads);
    const teracon::Targets asked = targets_of(kName, op, targets, row_of);
    teracon::LinearCrossEntropyBackward io{};
    io.grad = floats(kName, grad, asked.count, "grad");
    io.negligible = static_cast<float>(negligible);
    io.gradients.hidden = floats_or_null(kName, d_hidden, op.rows * op.channels, "d_hidden");
    io.gradients.weight = new_matrix(kName, d_weight, op.labels * op.channels, "d_weight");
    io.gradients.bias = floats(kName, d_bias, op.labels, "d_bias");
    io.gradients.add = add;
    STD_TORCH_CHECK(!add || io.gradients.weight.half == nullptr, kName, ": sums in bfloat16 are not offered");
    teracon::head_kernels<E>().cross_entropy_backward(op, asked, statistics_of(op, statistics), kept_of(op, exponentials, highest),
                                                      io);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def(
      "linear_cross_entropy_cpu_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int block, "
      "int threads, Tensor(a!) losses, Tensor(b!) statistics, Tensor(c!) exponentials, Tensor(d!) highest, Tensor(e!) best, "
      "Tensor(f!) rank) -> ()");
  m.def(
      "linear_cross_entropy_cpu_backward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int block, "
      "int threads, Tensor statistics, Tensor exponentials, Tensor highest, Tensor grad, bool add, float negligible, "
      "Tensor(a!) d_hidden, Tensor(b!) d_weight, Tensor(c!) d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("linear_cross_entropy_cpu_forward", TORCH_BOX(&forward));
  m.impl("linear_cross_entropy_cpu_backward", TORCH_BOX(&backward));
}
