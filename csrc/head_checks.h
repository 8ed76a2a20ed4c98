#pragma once

// Checks shared by the bindings of the operations on linear heads.

#include <cstdint>

#include "checks.h"
#include "cpu/head.h"
#include "cpu/large_pages.h"

namespace head_checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr auto kBf16 = ScalarType::BFloat16;

inline float* floats(const char* operation, const Tensor& tensor, int64_t count, const char* name) {
  return checked<float>(operation, tensor, ScalarType::Float, count, name);
}

// An empty tensor means that the output is not wanted.
inline float* floats_or_null(const char* operation, const Tensor& tensor, int64_t count, const char* name) {
  return tensor.numel() == 0 ? nullptr : floats(operation, tensor, count, name);
}

// Numbers in 0 to limit - 1.
inline const int64_t* numbers(const char* operation, const Tensor& tensor, int64_t count, int64_t limit, const char* name) {
  const int64_t* values = checked<int64_t>(operation, tensor, ScalarType::Long, count, name);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < limit, operation, ": ", name, " has ", values[i],
                    ", which is out of range: expected 0 to ", limit - 1);
  }
  return values;
}

inline teracon::Matrix matrix(const char* operation, const Tensor& tensor, int64_t count, const char* name) {
  if (tensor.scalar_type() == kBf16) return {nullptr, checked<teracon::Bf16>(operation, tensor, kBf16, count, name)};
  return {floats(operation, tensor, count, name), nullptr};
}

// Memory that is written for the first time.
inline teracon::MutableMatrix new_matrix(const char* operation, const Tensor& tensor, int64_t count, const char* name) {
  if (tensor.numel() == 0) return {nullptr, nullptr};
  const bool half = tensor.scalar_type() == kBf16;
  teracon::MutableMatrix found{nullptr, nullptr};
  if (half) {
    found.half = checked<teracon::Bf16>(operation, tensor, kBf16, count, name);
  } else {
    found.single = floats(operation, tensor, count, name);
  }
  teracon::prefer_large_pages(tensor.data_ptr(), count * (half ? 2 : 4));
  return found;
}

inline void elements(const Tensor& tensor, const char* operation, int64_t count, const char* name, const float** to) {
  *to = floats(operation, tensor, count, name);
}
inline void elements(const Tensor& tensor, const char* operation, int64_t count, const char* name, const teracon::Bf16** to) {
  *to = checked<teracon::Bf16>(operation, tensor, kBf16, count, name);
}

// hidden [R, f] of E, weight [C, f] of float32 or bfloat16, bias [C] of float32.
template <class E>
teracon::Head<E> head(const char* operation, const Tensor& hidden, const Tensor& weight, const Tensor& bias, int64_t block,
                      int64_t threads) {
  constexpr int64_t kMostLabels = int64_t{1} << 31;
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && weight.size(0) < kMostLabels && block >= 1 && block <= 4096 &&
                      threads >= 1 && threads <= 4096,
                  operation, ": expected hidden [R, f], weight [C, f], C below 2^31, 1 to 4096 labels in a block and threads");
  teracon::Head<E> op{};
  op.rows = hidden.size(0), op.labels = weight.size(0), op.channels = weight.size(1);
  elements(hidden, operation, op.rows * op.channels, "hidden", &op.hidden);
  op.weight = matrix(operation, weight, op.labels * op.channels, "weight");
  op.bias = floats(operation, bias, op.labels, "bias");
  op.block = block, op.threads = static_cast<int>(threads);
  return op;
}

template <class E>
teracon::Targets targets_of(const char* operation, const teracon::Head<E>& op, const Tensor& targets, const Tensor& row_of) {
  const int64_t count = targets.numel();
  return {count, numbers(operation, targets, count, op.labels, "targets"), numbers(operation, row_of, count, op.rows, "rows")};
}

// Calls fn with a value of the type that hidden states are stored in.
template <class Fn>
void with_element(const Tensor& hidden, const Fn& fn) {
  hidden.scalar_type() == kBf16 ? fn(teracon::Bf16{}) : fn(float{});
}

}  // namespace head_checks
