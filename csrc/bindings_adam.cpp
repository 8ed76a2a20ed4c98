// Declares to the dispatcher Adam's steps for gradients of few rows; see csrc/cpu/adam.h.
//
// Everything that determines where it reads or writes is checked here: no input leads out of bounds.

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

teracon::AdamArrays arrays(const char* operation, const Tensor& parameter, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           int64_t threads) {
  STD_TORCH_CHECK(parameter.dim() >= 1 && threads >= 1 && threads <= 4096, operation,
                  ": expected a parameter [rows, ...] and 1 to 4096 threads, got ", threads);
  teracon::AdamArrays found{};
  found.rows = parameter.size(0);
  const int64_t count = parameter.numel();
  found.channels = found.rows == 0 ? 0 : count / found.rows;
  found.parameter = checked<float>(operation, parameter, ScalarType::Float, count, "parameter");
  found.first = checked<float>(operation, exp_avg, ScalarType::Float, count, "exp_avg");
  found.second = checked<float>(operation, exp_avg_sq, ScalarType::Float, count, "exp_avg_sq");
  return found;
}

teracon::AdamGradient gradient_of(const char* operation, const teracon::AdamArrays& to, const Tensor& rows, const Tensor& values,
                                  int64_t tail) {
  teracon::AdamGradient found{};
  found.count = rows.numel(), found.tail = tail;
  found.rows = checked<int64_t>(operation, rows, ScalarType::Long, found.count, "rows");
  for (int64_t i = 0; i < found.count; ++i) {
    STD_TORCH_CHECK(found.rows[i] > (i == 0 ? -1 : found.rows[i - 1]) && found.rows[i] < to.rows, operation, ": rows has ",
                    found.rows[i], ", which is out of range or of order: expected 0 to ", to.rows - 1, ", ascending");
  }
  found.values = checked<float>(operation, values, ScalarType::Float, found.count * to.channels, "gradient");
  return found;
}

teracon::AdamNumbers numbers_of(double beta1, double beta2, double eps) {
  return {static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2), static_cast<float>(eps)};
}

teracon::AdamHistory history_of(const char* operation, const Tensor& steps, const Tensor& growing) {
  static_assert(sizeof(teracon::AdamStep) == 4 * sizeof(float));
  STD_TORCH_CHECK(steps.dim() == 2 && steps.size(1) == 4 && steps.size(0) < INT32_MAX, operation,
                  ": expected steps [n, 4] with n below 2^31");
  teracon::AdamHistory found{};
  found.steps = reinterpret_cast<const teracon::AdamStep*>(
      checked<float>(operation, steps, ScalarType::Float, steps.numel(), "steps"));
  found.num_growing = growing.numel();
  found.growing = checked<int64_t>(operation, growing, ScalarType::Long, found.num_growing, "growing");
  return found;
}

constexpr const char* kLast = ": last has a row that has taken more steps than there are, or less than -1";

void adam_rows(Tensor parameter, Tensor exp_avg, Tensor exp_avg_sq, Tensor rows, Tensor gradient, double beta1, double beta2,
               double eps, double step_size, double root, int64_t tail, int64_t threads) {
  const teracon::AdamArrays to = arrays("adam_rows", parameter, exp_avg, exp_avg_sq, threads);
  const teracon::AdamGradient with = gradient_of("adam_rows", to, rows, gradient, tail);
  teracon::adam(to, with, numbers_of(beta1, beta2, eps), teracon::adam_step(step_size, root),
                static_cast<int>(threads));
}

void adam_step(Tensor steps, int64_t at, double step_size, double root) {
  STD_TORCH_CHECK(steps.dim() == 2 && steps.size(1) == 4 && at >= 0 && at < steps.size(0),
                  "adam_step: expected steps [n, 4] and a place in it, got ", at);
  float* const to = checked<float>("adam_step", steps, ScalarType::Float, steps.numel(), "steps");
  reinterpret_cast<teracon::AdamStep*>(to)[at] = teracon::adam_step(step_size, root);
}

void adam_deferred(Tensor parameter, Tensor exp_avg, Tensor exp_avg_sq, Tensor last, Tensor rows, Tensor gradient, Tensor steps,
                   Tensor growing, double beta1, double beta2, double eps, int64_t tail, int64_t threads) {
  const teracon::AdamArrays to = arrays("adam_deferred", parameter, exp_avg, exp_avg_sq, threads);
  const teracon::AdamGradient with = gradient_of("adam_deferred", to, rows, gradient, tail);
  const teracon::AdamHistory history = history_of("adam_deferred", steps, growing);
  int32_t* const taken = checked<int32_t>("adam_deferred", last, ScalarType::Int, to.rows, "last");
  STD_TORCH_CHECK(steps.size(0) >= 1, "adam_deferred: expected the numbers of the step to take, got no steps");
  STD_TORCH_CHECK(teracon::adam_deferred(to, taken, with, numbers_of(beta1, beta2, eps), history, steps.size(0),
                                         static_cast<int>(threads)),
                  "adam_deferred", kLast);
}

int64_t adam_catch_up(Tensor parameter, Tensor exp_avg, Tensor exp_avg_sq, Tensor last, Tensor items, bool all, Tensor steps,
                      Tensor growing, double beta1, double beta2, double eps, int64_t threads) {
  const teracon::AdamArrays to = arrays("adam_catch_up", parameter, exp_avg, exp_avg_sq, threads);
  const teracon::AdamHistory history = history_of("adam_catch_up", steps, growing);
  int32_t* const taken = checked<int32_t>("adam_catch_up", last, ScalarType::Int, to.rows, "last");
  const int64_t* const wanted = checked<int64_t>("adam_catch_up", items, ScalarType::Long, items.numel(), "items");
  const int64_t behind = teracon::adam_catch_up(to, taken, all ? nullptr : wanted, items.numel(),
                                                numbers_of(beta1, beta2, eps), history, steps.size(0), static_cast<int>(threads));
  STD_TORCH_CHECK(behind >= 0, "adam_catch_up", kLast);
  return behind;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def(
      "adam_rows(Tensor(a!) parameter, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor gradient, float beta1, "
      "float beta2, float eps, float step_size, float root, int tail, int threads) -> ()");
  m.def("adam_step(Tensor(a!) steps, int at, float step_size, float root) -> ()");
  m.def(
      "adam_deferred(Tensor(a!) parameter, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) last, Tensor rows, "
      "Tensor gradient, Tensor steps, Tensor growing, float beta1, float beta2, float eps, int tail, int threads) -> ()");
  m.def(
      "adam_catch_up(Tensor(a!) parameter, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) last, Tensor items, bool all, "
      "Tensor steps, Tensor growing, float beta1, float beta2, float eps, int threads) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("adam_rows", TORCH_BOX(&adam_rows));
  m.impl("adam_step", TORCH_BOX(&adam_step));
  m.impl("adam_deferred", TORCH_BOX(&adam_deferred));
  m.impl("adam_catch_up", TORCH_BOX(&adam_catch_up));
}
