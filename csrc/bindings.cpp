// Only the bindings know torch: they declare the compiled operations to the dispatcher, nothing else.
//
// Built on the stable ABI, so one build serves the torch it was built with and later ones, and any Python.

#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "cpu/fma_peak.h"
#include "cpu/masked_conv.h"

namespace {

using torch::stable::Tensor;

float* floats(const Tensor& tensor, int64_t count, const char* name) {
  return checked<float>("masked_conv", tensor, torch::headeronly::ScalarType::Float, count, name);
}

// Row numbers in -1 (0 where `none` is false) to rows - 1.
const int32_t* row_numbers(const Tensor& tensor, int64_t count, int64_t rows, bool none, const char* name) {
  const int32_t* values = checked<int32_t>("masked_conv", tensor, torch::headeronly::ScalarType::Int, count, name);
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < count; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  STD_TORCH_CHECK(low >= (none ? -1 : 0) && high < rows, "masked_conv: ", name, " has rows ", low, " to ", high,
                  ", which is out of range: expected less than ", rows);
  return values;
}

constexpr auto kBf16 = torch::headeronly::ScalarType::BFloat16;

float* elements(const Tensor& tensor, int64_t count, const char* name, float*) { return floats(tensor, count, name); }
teracon::Bf16* elements(const Tensor& tensor, int64_t count, const char* name, teracon::Bf16*) {
  return checked<teracon::Bf16>("masked_conv", tensor, kBf16, count, name);
}

// Dense activations of type E.
template <class E>
E* rows_of(const Tensor& tensor, int64_t count, const char* name) {
  return elements(tensor, count, name, static_cast<E*>(nullptr));
}

template <class E>
teracon::MaskedConv<E> masked_conv(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& ln_weight,
                                   const Tensor& ln_bias, const Tensor& mask, const Tensor& taps, const Tensor& readers,
                                   int64_t bags, const Tensor& rows_per_request, double eps, int64_t algorithm,
                                   int64_t threads) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && taps.dim() == 2 && threads >= 1 && threads <= 4096,
                  "masked_conv: expected x [rows_in, f_in], weight [f_out, f_in, K], taps [rows, K], 1 to 4096 threads");
  teracon::MaskedConv<E> op{};
  op.rows_in = x.size(0), op.rows = taps.size(0), op.requests = rows_per_request.numel();
  op.f_out = weight.size(0), op.f_in = weight.size(1), op.kernel_size = weight.size(2);
  op.x = rows_of<E>(x, op.rows_in * op.f_in, "x");
  op.weight = floats(weight, op.f_out * op.f_in * op.kernel_size, "weight");
  op.bias = floats(bias, op.f_out, "bias");
  op.ln_weight = floats(ln_weight, op.f_out, "ln_weight");
  op.ln_bias = floats(ln_bias, op.f_out, "ln_bias");
  op.mask = floats(mask, op.requests * op.f_out, "mask");
  op.taps = row_numbers(taps, op.rows * op.kernel_size, op.rows_in, true, "taps");
  op.readers = row_numbers(readers, op.rows_in * op.kernel_size, op.rows + bags, true, "readers");
  op.rows_per_request = checked<int64_t>("masked_conv", rows_per_request, torch::headeronly::ScalarType::Long, op.requests,
                                         "rows_per_request");
  int64_t rows = 0;
  for (int64_t q = 0; q < op.requests; ++q) {
    STD_TORCH_CHECK(op.rows_per_request[q] >= 0, "masked_conv: rows_per_request has a negative number");
    rows += op.rows_per_request[q];
  }
  STD_TORCH_CHECK(rows == op.rows, "masked_conv: rows_per_request sums to ", rows, ", expected ", op.rows);
  op.eps = static_cast<float>(eps), op.threads = static_cast<int>(threads);
  STD_TORCH_CHECK(algorithm >= 0 && algorithm <= 2, "masked_conv: algorithm is ", algorithm, ", expected 0, 1 or 2");
  op.algorithm = static_cast<teracon::Algorithm>(algorithm);
  STD_TORCH_CHECK(op.algorithm != teracon::Algorithm::kFiltered || op.kernel_size == 3,
                  "masked_conv: minimal filtering needs 3 taps, got ", op.kernel_size);
  return op;
}

template <class E>
void forward_of(const teracon::MaskedConv<E>& op, const Tensor& addend, const Tensor& residual, const Tensor& residual_rows,
                const Tensor& out, const Tensor& conv, const Tensor& mean, const Tensor& rstd) {
  const int64_t all = op.rows * op.f_out;
  teracon::MaskedConvForward<E> io{};
  if (addend.numel() != 0) io.addend = rows_of<E>(addend, all, "addend");
  if (residual.numel() != 0) {
    io.residual = rows_of<E>(residual, residual.numel(), "residual");
    io.residual_rows = row_numbers(residual_rows, op.rows, residual.numel() / op.f_out, false, "residual_rows");
  }
  io.out = rows_of<E>(out, all, "out");
  if (conv.numel() != 0) {
    io.conv = rows_of<E>(conv, all, "conv");
    io.mean = floats(mean, op.rows, "mean");
    io.rstd = floats(rstd, op.rows, "rstd");
  }
  teracon::kernels<E>().forward(op, io);
}

// An empty tensor: no residual, nothing saved, or no gradient wanted. The type of x is that of all activations; parameters,
// masks and statistics are float32.
void masked_conv_forward(Tensor x, Tensor weight, Tensor bias, Tensor ln_weight, Tensor ln_bias, Tensor mask, Tensor taps,
                         Tensor readers, int64_t bags, Tensor rows_per_request, double eps, int64_t algorithm,
                         int64_t threads, Tensor addend, Tensor residual, Tensor residual_rows, Tensor out, Tensor conv,
                         Tensor mean, Tensor rstd) {
  const auto run = [&](auto element) {
    using E = decltype(element);
    forward_of(masked_conv<E>(x, weight, bias, ln_weight, ln_bias, mask, taps, readers, bags, rows_per_request, eps,
                              algorithm, threads),
               addend, residual, residual_rows, out, conv, mean, rstd);
  };
  x.scalar_type() == kBf16 ? run(teracon::Bf16{}) : run(float{});
}

template <class E>
void backward_of(const teracon::MaskedConv<E>& op, const Tensor& grad, const Tensor& conv, const Tensor& mean,
                 const Tensor& rstd, const Tensor& bag_rows, const Tensor& bag_offsets, const Tensor& residual_readers,
                 const Tensor& d_x, const Tensor& d_weight, const Tensor& d_bias, const Tensor& d_ln_weight,
                 const Tensor& d_ln_bias, const Tensor& d_mask, const Tensor& d_residual, const Tensor& d_addend) {
  const int64_t all = op.rows * op.f_out;
  teracon::MaskedConvBackward<E> io{};
  io.grad = rows_of<E>(grad, all, "grad");
  io.conv = rows_of<E>(conv, all, "conv");
  io.mean = floats(mean, op.rows, "mean");
  io.rstd = floats(rstd, op.rows, "rstd");
  io.bags = bag_offsets.numel() - 1;
  const int64_t members = bag_rows.numel();
  io.bag_rows = row_numbers(bag_rows, members, op.rows, false, "bag_rows");
  io.bag_offsets = row_numbers(bag_offsets, io.bags + 1, members + 1, false, "bag_offsets");
  if (residual_readers.numel() != 0) {
    io.residual_count = residual_readers.numel();
    io.residual_readers = row_numbers(residual_readers, io.residual_count, op.rows, true, "residual_readers");
    io.d_residual = rows_of<E>(d_residual, io.residual_count * op.f_out, "d_residual");
  }
  if (d_x.numel() != 0) io.d_x = rows_of<E>(d_x, op.rows_in * op.f_in, "d_x");
  if (d_weight.numel() != 0) io.d_weight = floats(d_weight, op.f_out * op.f_in * op.kernel_size, "d_weight");
  if (d_addend.numel() != 0) io.d_addend = rows_of<E>(d_addend, all, "d_addend");
  io.d_bias = floats(d_bias, op.f_out, "d_bias");
  io.d_ln_weight = floats(d_ln_weight, op.f_out, "d_ln_weight");
  io.d_ln_bias = floats(d_ln_bias, op.f_out, "d_ln_bias");
  io.d_mask = floats(d_mask, op.requests * op.f_out, "d_mask");
  teracon::kernels<E>().backward(op, io);
}

void masked_conv_backward(Tensor x, Tensor weight, Tensor bias, Tensor ln_weight, Tensor ln_bias, Tensor mask, Tensor taps,
                          Tensor readers, Tensor rows_per_request, double eps, int64_t algorithm, int64_t threads,
                          Tensor grad, Tensor conv, Tensor mean, Tensor rstd, Tensor bag_rows, Tensor bag_offsets,
                          Tensor residual_readers, Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_ln_weight,
                          Tensor d_ln_bias, Tensor d_mask, Tensor d_residual, Tensor d_addend) {
  const auto run = [&](auto element) {
    using E = decltype(element);
    backward_of(masked_conv<E>(x, weight, bias, ln_weight, ln_bias, mask, taps, readers, bag_offsets.numel() - 1,
                               rows_per_request, eps, algorithm, threads),
                grad, conv, mean, rstd, bag_rows, bag_offsets, residual_readers, d_x, d_weight, d_bias, d_ln_weight, d_ln_bias,
                d_mask, d_residual, d_addend);
  };
  x.scalar_type() == kBf16 ? run(teracon::Bf16{}) : run(float{});
}

std::string cpu_isa() { return teracon::cpu_isa(); }

double fma_peak(int64_t threads) {
  STD_TORCH_CHECK(threads >= 1 && threads <= 4096, "fma_peak: got ", threads, " threads, expected 1 to 4096");
  return teracon::fma_peak(static_cast<int>(threads));
}

std::string fma_instructions() {
  return teracon::fma_instructions();
}

}  // namespace

// A fragment, because the Python package registers operations in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def("fma_peak(int threads) -> float");
  m.def("fma_instructions() -> str");
  m.def("cpu_isa() -> str");
  m.def(
      "masked_conv_cpu_forward(Tensor x, Tensor weight, Tensor bias, Tensor ln_weight, Tensor ln_bias, Tensor mask, "
      "Tensor taps, Tensor readers, int bags, Tensor rows_per_request, float eps, int algorithm, int threads, "
      "Tensor addend, Tensor residual, Tensor residual_rows, Tensor(a!) out, Tensor(b!) conv, Tensor(c!) mean, "
      "Tensor(d!) rstd) -> ()");
  m.def(
      "masked_conv_cpu_backward(Tensor x, Tensor weight, Tensor bias, Tensor ln_weight, Tensor ln_bias, Tensor mask, "
      "Tensor taps, Tensor readers, Tensor rows_per_request, float eps, int algorithm, int threads, Tensor grad, "
      "Tensor conv, Tensor mean, Tensor rstd, Tensor bag_rows, Tensor bag_offsets, Tensor residual_readers, "
      "Tensor(a!) d_x, Tensor(b!) d_weight, Tensor(c!) d_bias, Tensor(d!) d_ln_weight, Tensor(e!) d_ln_bias, "
      "Tensor(f!) d_mask, Tensor(g!) d_residual, Tensor(h!) d_addend) -> ()");
}

// These take no tensor, so no device chooses between implementations.
STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CompositeExplicitAutograd, m) {
  m.impl("fma_peak", TORCH_BOX(&fma_peak));
  m.impl("fma_instructions", TORCH_BOX(&fma_instructions));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("masked_conv_cpu_forward", TORCH_BOX(&masked_conv_forward));
  m.impl("masked_conv_cpu_backward", TORCH_BOX(&masked_conv_backward));
}
