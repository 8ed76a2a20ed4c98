// The encoder without gradient, declared to torch's dispatcher. Like every bindings file it checks what the kernels rely on.

#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "cpu/encode.h"
#include "cpu/masked_conv.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* given(const Tensor& tensor, ScalarType type, int64_t count, const char* name) {
  return checked<T>("encode", tensor, type, count, name);
}

// fn(element) for the type that rows are stored as.
template <class Fn>
auto by_type(bool bf16, Fn fn) {
  return bf16 ? fn(teracon::Bf16{}) : fn(float{});
}

int64_t encoder_words(int64_t channels, int64_t kernel_size, bool bf16) {
  STD_TORCH_CHECK(channels >= 1 && channels <= 1 << 16 && kernel_size >= 1 && kernel_size <= 1 << 10,
                  "encoder_words: got ", channels, " channels and ", kernel_size, " taps");
  return by_type(bf16, [&](auto e) { return teracon::kernels<decltype(e)>().encoder_words(channels, kernel_size); });
}

void encoder_pack(Tensor weight, bool bf16, int64_t threads, Tensor words) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == weight.size(1) && threads >= 1 && threads <= 4096,
                  "encoder_pack: expected weight [f, f, K] and 1 to 4096 threads");
  teracon::Convolution op{weight.size(1), weight.size(0), weight.size(2), nullptr, static_cast<int>(threads)};
  op.weight = given<float>(weight, ScalarType::Float, weight.numel(), "weight");
  int32_t* to = given<int32_t>(words, ScalarType::Int, encoder_words(op.f_in, op.kernel_size, bf16), "words");
  by_type(bf16, [&](auto e) { teracon::kernels<decltype(e)>().encoder_pack(op, to); });
}

// What a layer's rows read must be rows of the layer below.
template <class E>
void check_layers(const teracon::Encode<E>& op, int64_t offsets) {
  STD_TORCH_CHECK(op.starts[0] == 0 && op.starts[op.convolutions + 1] == offsets, "encode: starts do not cover the offsets");
  const auto has = [&](int64_t layer, int64_t offset) {
    const int32_t* rank = op.ranks + layer * (op.length + 1);
    return rank[offset + 1] == rank[offset] + 1;
  };
  for (int64_t layer = 0; layer <= op.convolutions; ++layer) {
    const int32_t* rank = op.ranks + layer * (op.length + 1);
    const int64_t start = op.starts[layer], count = op.starts[layer + 1] - start;
    STD_TORCH_CHECK(count >= 1 && start + count <= offsets && rank[0] == 0 && rank[op.length] == count && op.offsets[start] == 0,
                    "encode: offsets and ranks of layer ", layer, " do not fit");
    for (int64_t o = 0; o < op.length; ++o) {
      STD_TORCH_CHECK(rank[o + 1] == rank[o] || (rank[o + 1] == rank[o] + 1 && op.offsets[start + rank[o]] == o),
                      "encode: offsets and ranks of layer ", layer, " do not fit");
    }
    for (int64_t p = 0; layer > 0 && p < count; ++p) {
      const int64_t offset = op.offsets[start + p];
      for (int64_t k = 0; k < op.kernel_size; ++k) {
        const int64_t read = offset + k * op.dilations[layer - 1];
        STD_TORCH_CHECK(read >= op.length || has(layer - 1, read), "encode: layer ", layer - 1, " lacks offset ", read);
      }
      STD_TORCH_CHECK(layer % 2 || has(layer - 2, offset), "encode: layer ", layer - 2, " lacks offset ", offset);
    }
  }
}

void encode(Tensor x, Tensor lengths, int64_t available, Tensor embedding, Tensor words, Tensor bias, Tensor ln_weight,
            Tensor ln_bias, Tensor pads, Tensor dilations, int64_t kernel_size, Tensor offsets, Tensor starts, Tensor ranks,
            double eps, bool filtered, bool bf16, int64_t threads, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 2 && embedding.dim() == 2 && threads >= 1 && threads <= 4096 && kernel_size >= 2,
                  "encode: expected x [users, L], embedding [items, f], at least 2 taps, 1 to 4096 threads");
  by_type(bf16, [&](auto e) {
    using E = decltype(e);
    teracon::Encode<E> op{};
    op.users = x.size(0), op.length = x.size(1), op.items = embedding.size(0), op.f = embedding.size(1);
    op.kernel_size = kernel_size, op.convolutions = dilations.numel(), op.available = available;
    const int64_t per_layer = op.convolutions * op.f, layers = op.convolutions + 1;
    STD_TORCH_CHECK(available >= 1 && available <= op.length, "encode: available is ", available, ", expected 1 to ", op.length);
    op.x = given<int64_t>(x, ScalarType::Long, op.users * op.length, "x");
    op.lengths = given<int64_t>(lengths, ScalarType::Long, op.users, "lengths");
    op.embedding = given<float>(embedding, ScalarType::Float, op.items * op.f, "embedding");
    op.words = given<int32_t>(words, ScalarType::Int, op.convolutions * encoder_words(op.f, kernel_size, bf16), "words");
    op.bias = given<float>(bias, ScalarType::Float, per_layer, "bias");
    op.ln_weight = given<float>(ln_weight, ScalarType::Float, per_layer, "ln_weight");
    op.ln_bias = given<float>(ln_bias, ScalarType::Float, per_layer, "ln_bias");
    op.pads = given<float>(pads, ScalarType::Float, layers * op.length * op.f, "pads");
    op.dilations = given<int32_t>(dilations, ScalarType::Int, op.convolutions, "dilations");
    op.offsets = given<int32_t>(offsets, ScalarType::Int, offsets.numel(), "offsets");
    op.starts = given<int64_t>(starts, ScalarType::Long, layers + 1, "starts");
    op.ranks = given<int32_t>(ranks, ScalarType::Int, layers * (op.length + 1), "ranks");
    op.out = given<float>(out, ScalarType::Float, op.users * op.f, "out");
    op.eps = static_cast<float>(eps), op.filtered = filtered, op.threads = static_cast<int>(threads);
    STD_TORCH_CHECK(!filtered || kernel_size == 3, "encode: minimal filtering needs 3 taps, got ", kernel_size);
    for (int64_t c = 0; c < op.convolutions; ++c) STD_TORCH_CHECK(op.dilations[c] >= 1, "encode: a dilation is below 1");
    check_layers(op, offsets.numel());
    for (int64_t u = 0; u < op.users; ++u) {
      STD_TORCH_CHECK(op.lengths[u] >= 0 && op.lengths[u] <= available, "encode: length ", op.lengths[u], " of row ", u,
                      ", expected 0 to ", available);
      for (int64_t p = available - op.lengths[u]; p < available; ++p) {
        const int64_t item = op.x[u * op.length + p];
        STD_TORCH_CHECK(item >= 0 && item < op.items, "encode: x has item ", item, " in row ", u, ", out of range: expected 0 to ",
                        op.items - 1);
      }
    }
    teracon::kernels<E>().encode(op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def("encoder_words(int channels, int kernel_size, bool bf16) -> int");
  m.def("encoder_pack(Tensor weight, bool bf16, int threads, Tensor(a!) words) -> ()");
  m.def(
      "encode(Tensor x, Tensor lengths, int available, Tensor embedding, Tensor words, Tensor bias, Tensor ln_weight, "
      "Tensor ln_bias, Tensor pads, Tensor dilations, int kernel_size, Tensor offsets, Tensor starts, Tensor ranks, "
      "float eps, bool filtered, bool bf16, int threads, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CompositeExplicitAutograd, m) {
  m.impl("encoder_words", TORCH_BOX(&encoder_words));
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("encoder_pack", TORCH_BOX(&encoder_pack));
  m.impl("encode", TORCH_BOX(&encode));
}
