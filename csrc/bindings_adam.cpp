// Declares Adam's step on a parameter whose gradient has few rows to the dispatcher; see csrc/cpu/adam.h.
//
// Everything that decides where it reads or writes is checked here: no input makes it leave an array.

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "cpu/adam.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

float* floats(const Tensor& tensor, int64_t count, const char* name) {
  return checked<float>("adam_rows", tensor, ScalarType::Float, count, name);
}

void adam_rows(Tensor parameter, Tensor exp_avg, Tensor exp_avg_sq, Tensor rows, Tensor gradient, double beta1, double beta2,
               double eps, double step_size, double root, int64_t threads) {
  STD_TORCH_CHECK(parameter.dim() >= 1 && threads >= 1 && threads <= 4096,
                  "adam_rows: expected a parameter [rows, ...] and 1 to 4096 threads, got ", threads);
  teracon::AdamRows op{};
  op.rows = parameter.size(0), op.count = rows.numel();
  op.channels = op.rows == 0 ? 0 : parameter.numel() / op.rows;
  op.parameter = floats(parameter, op.rows * op.channels, "parameter");
  op.first = floats(exp_avg, op.rows * op.channels, "exp_avg");
  op.second = floats(exp_avg_sq, op.rows * op.channels, "exp_avg_sq");
  op.with = checked<int64_t>("adam_rows", rows, ScalarType::Long, op.count, "rows");
  for (int64_t i = 0; i < op.count; ++i) {
    STD_TORCH_CHECK(op.with[i] > (i == 0 ? -1 : op.with[i - 1]) && op.with[i] < op.rows, "adam_rows: rows has ", op.with[i],
                    ", which is out of range or of order: expected 0 to ", op.rows - 1, ", ascending");
  }
  op.gradient = floats(gradient, op.count * op.channels, "gradient");
  const teracon::AdamNumbers numbers{static_cast<float>(beta1),     static_cast<float>(beta2),
                                     static_cast<float>(1 - beta1), static_cast<float>(1 - beta2),
                                     static_cast<float>(step_size), static_cast<float>(1 / root),
                                     static_cast<float>(eps)};
  teracon::adam(op, numbers, static_cast<int>(threads));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def(
      "adam_rows(Tensor(a!) parameter, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor gradient, float beta1, "
      "float beta2, float eps, float step_size, float root, int threads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) { m.impl("adam_rows", TORCH_BOX(&adam_rows)); }
