// Declares the losses of heads to the dispatcher; see csrc/cpu/linear_cross_entropy.h.
//
// Everything that decides where they read or write is checked here: no input makes them leave an array.

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "cpu/large_pages.h"
#include "cpu/linear_cross_entropy.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

float* floats(const Tensor& tensor, int64_t count, const char* name) {
  return checked<float>("linear_cross_entropy", tensor, ScalarType::Float, count, name);
}

// Numbers in 0 to limit - 1.
const int64_t* numbers(const Tensor& tensor, int64_t count, int64_t limit, const char* name) {
  const int64_t* values = checked<int64_t>("linear_cross_entropy", tensor, ScalarType::Long, count, name);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < limit, "linear_cross_entropy: ", name, " has ", values[i],
                    ", which is out of range: expected 0 to ", limit - 1);
  }
  return values;
}

teracon::LinearCrossEntropy head(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& targets,
                                 const Tensor& row_of, int64_t block, int64_t threads) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && block >= 1 && block <= 4096 && threads >= 1 && threads <= 4096,
                  "linear_cross_entropy: expected hidden [R, f], weight [C, f], 1 to 4096 labels in a block and threads");
  teracon::LinearCrossEntropy op{};
  op.rows = hidden.size(0), op.labels = weight.size(0), op.channels = weight.size(1), op.count = targets.numel();
  op.hidden = floats(hidden, op.rows * op.channels, "hidden");
  op.weight = floats(weight, op.labels * op.channels, "weight");
  op.bias = floats(bias, op.labels, "bias");
  op.targets = numbers(targets, op.count, op.labels, "targets");
  op.row_of = numbers(row_of, op.count, op.rows, "rows");
  op.block = block, op.threads = static_cast<int>(threads);
  return op;
}

teracon::HeadStatistics statistics_of(const teracon::LinearCrossEntropy& op, const Tensor& statistics) {
  float* values = floats(statistics, 2 * op.rows, "statistics");
  return {values, values + op.rows};
}

// An empty tensor stands for what is absent: nothing kept, no gradient wanted.
teracon::KeptLogits kept_of(const teracon::LinearCrossEntropy& op, const Tensor& exponentials, const Tensor& highest) {
  if (exponentials.numel() == 0) return {nullptr, nullptr};
  return {floats(exponentials, op.labels * op.padded_rows(), "exponentials"),
          floats(highest, op.blocks() * op.padded_rows(), "highest")};
}

void forward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int64_t block, int64_t threads,
             Tensor losses, Tensor statistics, Tensor exponentials, Tensor highest) {
  const teracon::LinearCrossEntropy op = head(hidden, weight, bias, targets, row_of, block, threads);
  teracon::head_kernels().forward(op, statistics_of(op, statistics), kept_of(op, exponentials, highest),
                                  floats(losses, op.count, "losses"));
}

void backward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int64_t block, int64_t threads,
              Tensor statistics, Tensor exponentials, Tensor highest, Tensor grad, bool add, Tensor d_hidden, Tensor d_weight,
              Tensor d_bias) {
  const teracon::LinearCrossEntropy op = head(hidden, weight, bias, targets, row_of, block, threads);
  teracon::LinearCrossEntropyBackward io{};
  io.grad = floats(grad, op.count, "grad");
  if (d_hidden.numel() != 0) io.d_hidden = floats(d_hidden, op.rows * op.channels, "d_hidden");
  if (d_weight.numel() != 0) io.d_weight = floats(d_weight, op.labels * op.channels, "d_weight");
  io.add = add;
  if (io.d_weight != nullptr && !add) teracon::prefer_large_pages(io.d_weight, 4 * d_weight.numel());
  io.d_bias = floats(d_bias, op.labels, "d_bias");
  teracon::head_kernels().backward(op, statistics_of(op, statistics), kept_of(op, exponentials, highest), io);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def(
      "linear_cross_entropy_cpu_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int block, "
      "int threads, Tensor(a!) losses, Tensor(b!) statistics, Tensor(c!) exponentials, Tensor(d!) highest) -> ()");
  m.def(
      "linear_cross_entropy_cpu_backward(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor row_of, int block, "
      "int threads, Tensor statistics, Tensor exponentials, Tensor highest, Tensor grad, bool add, Tensor(a!) d_hidden, "
      "Tensor(b!) d_weight, Tensor(c!) d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("linear_cross_entropy_cpu_forward", TORCH_BOX(&forward));
  m.impl("linear_cross_entropy_cpu_backward", TORCH_BOX(&backward));
}
