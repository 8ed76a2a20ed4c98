// Declares the distance of two heads' logits to the dispatcher; see csrc/cpu/retention_mse.h.
//
// Everything that determines where the kernels read or write is checked here: no input leads out of bounds.

#include <torch/csrc/stable/library.h>

#include "cpu/head_kernels.h"
#include "head_checks.h"

namespace {

using namespace head_checks;

constexpr char kName[] = "retention_mse";

// Empty gradients are not wanted.
double retention(Tensor hidden, Tensor weight, Tensor bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor teacher_bias,
                 double coefficient, int64_t block, int64_t threads, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_logits) {
  double loss = 0.0;
  with_element(hidden, [&](auto element) {
    using E = decltype(element);
    const teracon::Head<E> student = head<E>(kName, hidden, weight, bias, block, threads);
    const teracon::Head<E> teacher = head<E>(kName, teacher_hidden, teacher_weight, teacher_bias, block, threads);
    STD_TORCH_CHECK(teacher.rows == student.rows && teacher.labels == student.labels && teacher.channels == student.channels, kName,
                    ": student and teacher differ in shape");
    teracon::HeadGradients io{};
    io.hidden = floats_or_null(kName, d_hidden, student.rows * student.channels, "d_hidden");
    io.weight = new_matrix(kName, d_weight, student.labels * student.channels, "d_weight");
    io.bias = floats_or_null(kName, d_bias, student.labels, "d_bias");
    const teracon::LogitGradients logits{floats_or_null(kName, d_logits, student.labels * student.rows, "d_logits")};
    loss = teracon::head_kernels<E>().retention(student, teacher, static_cast<float>(coefficient), io, logits);
  });
  return loss;
}

// Products are of float32. Empty moments: no gradients. `known`: the teacher's part of the matrix is left out.
void retention_gram(Tensor weight, Tensor bias, Tensor teacher_weight, Tensor teacher_bias, bool known, Tensor moments,
                    Tensor bias_moments, int64_t block, int64_t threads, Tensor gram, Tensor d_weight, Tensor d_bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && block >= 1 && block <= 4096 && threads >= 1 && threads <= 4096, kName,
                  ": expected weight [C, f], 1 to 4096 labels in a block and threads");
  teracon::RetentionGram op{};
  op.labels = weight.size(0), op.channels = weight.size(1), op.block = block, op.threads = static_cast<int>(threads);
  const int64_t all = op.labels * op.channels, width = op.width();
  op.student = matrix(kName, weight, all, "weight"), op.teacher = matrix(kName, teacher_weight, all, "teacher_weight");
  op.student_bias = floats(kName, bias, op.labels, "bias");
  op.teacher_bias = floats(kName, teacher_bias, op.labels, "teacher_bias");
  op.teacher_known = known;
  op.gram = checked<double>(kName, gram, ScalarType::Double, width * width, "gram");
  if (moments.numel() != 0) {
    op.moments = floats(kName, moments, width * op.channels, "moments");
    op.bias_moments = floats(kName, bias_moments, width, "bias_moments");
    op.d_weight = new_matrix(kName, d_weight, all, "d_weight");
    op.d_bias = floats_or_null(kName, d_bias, op.labels, "d_bias");
  }
  teracon::head_kernels<float>().retention_gram(op);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def(
      "retention_mse_cpu(Tensor hidden, Tensor weight, Tensor bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor teacher_bias, "
      "float coefficient, int block, int threads, Tensor(a!) d_hidden, Tensor(b!) d_weight, Tensor(c!) d_bias, Tensor(d!) d_logits) -> "
      "float");
  m.def(
      "retention_gram_cpu(Tensor weight, Tensor bias, Tensor teacher_weight, Tensor teacher_bias, bool known, Tensor moments, "
      "Tensor bias_moments, int block, int threads, Tensor(a!) gram, Tensor(b!) d_weight, Tensor(c!) d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CPU, m) {
  m.impl("retention_mse_cpu", TORCH_BOX(&retention));
  m.impl("retention_gram_cpu", TORCH_BOX(&retention_gram));
}
