#pragma once

// Checks of the bindings before a tensor's memory is passed to plain C++.

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

// Dense arrays of the expected type and number of elements, or an error: the kernels never read out of bounds.
template <class T>
T* checked(const char* operation, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type, int64_t count,
           const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == count,
                  operation, ": ", name, " has ", tensor.numel(), " elements, expected a dense CPU tensor of ", count,
                  " of type ", torch::headeronly::toString(type));
  return static_cast<T*>(tensor.data_ptr());
}
