// The distance of two heads' logits for one instruction set and both element types. Included by isa_*.cpp after head_impl.h.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

// d[i] = (student[i] . panel + its bias) + (teacher[i] . other - its bias) for R labels and NR rows, where `other` is negative. Both
// logits are formed whole, by the same operations: where student and teacher are equal, their difference is zero.
template <class T, int R>
static void difference_tile(const StridedRows& student, const float* bias, const Word* panel, const StridedRows& teacher,
                            const float* other_bias, const Word* other, int64_t units, float* d) {
  V acc[R][NV];
  for_tile<R>(acc, [&](V& v, int i, int) { v = splat(-other_bias[i]); });
  accumulate<T>(acc, teacher, other, units);
  for_tile<R>(acc, [&](V& v, int i, int j) {
    store(d + i * NR + j, v);
    v = splat(bias[i]);
  });
  accumulate<T>(acc, student, panel, units);
  for_tile<R>(acc, [&](V& v, int i, int j) { store(d + i * NR + j, v + load(d + i * NR + j)); });
}

// d_logit = 2 * coefficient * difference. Sums up the squares of the differences on the way.
template <class E>
class RetentionForm {
 public:
  RetentionForm(const Head<E>& student, const Head<E>& teacher, const HeadRows<E>& rows, const HeadRows<E>& others, float coefficient,
                const LogitGradients& logits)
      : student_(student), teacher_(teacher), rows_(rows), others_(others), coefficient_(coefficient), logits_(logits), weights_(teacher) {}

  void begin(int64_t, int64_t first, int64_t n, const BothWays& weight) {
    first_ = first, n_ = n, weight_ = weight, other_ = weights_.of(first, n);
  }

  void operator()(int64_t panel, float* d, bool*) {
    cover(n_, [&](auto size, int64_t label) {
      difference_tile<Operand<E>, decltype(size)::value>(weight_.row(label), student_.bias + first_ + label, rows_.panel(panel),
                                                         other_.row(label), teacher_.bias + first_ + label, others_.panel(panel),
                                                         rows_.units, d + label * NR);
    });
    const V factor = splat(2.0f * coefficient_);
    for (int j = 0; j < NR; j += W) {
      const I present = rows_.present(panel, j / W);
      V squares = {};
      for (int64_t label = 0; label < n_; ++label) {
        float* const at = d + label * NR + j;
        const V v = present ? load(at) : V{};
        squares += v * v;
        store(at, v * factor);
        const int64_t row = panel * NR + j, left = student_.rows - row;
        if (logits_.to != nullptr && left > 0) store_part(logits_.to + (first_ + label) * student_.rows + row, v * factor, left);
      }
      loss += sum(squares);
    }
  }

  double loss = 0.0;

 private:
  const Head<E>&student_, &teacher_;
  const HeadRows<E>&rows_, &others_;
  float coefficient_;
  const LogitGradients& logits_;
  BlockWeights<E> weights_;
  BothWays weight_{}, other_{};
  int64_t first_ = 0, n_ = 0;
};

template <class E>
static double retention(const Head<E>& student, const Head<E>& teacher, float coefficient, const HeadGradients& io,
                        const LogitGradients& logits) {
  HeadRows<E> rows(student, io.weight.wanted()), others(teacher, false, -1.0f);
  GradientPass<E> pass(student, rows, io);
  Array<double> losses(student.threads, true);
  in_parallel(student.threads, [&] {
    rows.pack();
    others.pack();
    RetentionForm<E> form(student, teacher, rows, others, coefficient, logits);
    pass.run(form);
    losses.get()[omp_get_thread_num()] = form.loss;
  });
  double total = 0.0;
  for (int t = 0; t < student.threads; ++t) total += losses.get()[t];
  return total * coefficient;
}

// M^T M and d(weight), a block of labels of M at a time, in float32.
class GramPass {
  // Blocks whose products are summed in float32 before they are added to the sums in double.
  static constexpr int64_t kBlocksAtOnce = 16;

 public:
  explicit GramPass(const RetentionGram& op)
      : op_(op), width_(op.width()), padded_(round_up(width_, NR)), columns_(round_up(op.channels, NR)),
        moments_(op.moments == nullptr ? 0 : width_ * columns_), partials_(op.threads) {}

  // Called by every thread of a team.
  void run() {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t blocks = (op_.labels + op_.block - 1) / op_.block, height = round_up(width_, OR);
    int64_t low, high;
    share(blocks, threads, thread, &low, &high);
    pack_moments();
    Array<float> sums(height * padded_, true), matrix(op_.block * pitch(), true), d_weight(MR * columns_);
    Array<double> totals(height * padded_, true);
    for (int64_t block = low; block < high; ++block) {
      const int64_t first = block * op_.block, n = std::min(op_.block, op_.labels - first);
      fill(first, n, matrix.get());
      add_squares(matrix.get(), n, sums.get());
      if (op_.moments != nullptr) put_weight(first, n, matrix.get(), d_weight.get());
      if ((block - low) % kBlocksAtOnce == kBlocksAtOnce - 1 || block == high - 1) {
        for (int64_t i = 0; i < height * padded_; ++i) totals.get()[i] += sums.get()[i];
        std::memset(sums.get(), 0, sizeof(float) * height * padded_);
      }
    }
    // In thread order.
    partials_.get()[thread] = totals.get();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < width_; ++i) {
      for (int64_t j = i; j < width_; ++j) {
        double total = 0.0;
        for (int t = 0; t < threads; ++t) total += partials_.get()[t][i * padded_ + j];
        op_.gram[i * width_ + j] = total;
      }
    }
  }

 private:
  // A cache line more than the row: rows a power of two apart would meet in few sets of the first-level cache.
  int64_t pitch() const { return padded_ + 16; }

  // moments [width, channels] as panels [column tiles][width][NR].
  void pack_moments() {
    if (op_.moments == nullptr) return;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < width_; ++row) {
      for (int64_t c = 0; c < columns_; c += W) {
        const int64_t left = op_.channels - c;
        store(moments_.get() + (c / NR * width_ + row) * NR + c % NR,
              left > 0 ? load_part(op_.moments + row * op_.channels + c, left) : V{});
      }
    }
  }

  // Rows [Ws - Wt, bs - bt, Wt] of n labels.
  void fill(int64_t first, int64_t n, float* to) const {
    const int64_t f = op_.channels;
    const auto weights = [&](const Matrix& m, int64_t label, int64_t c) {
      return m.half == nullptr ? load_part(m.single + label * f + c, f - c) : load_part(m.half + label * f + c, f - c);
    };
    for (int64_t i = 0; i < n; ++i, to += pitch()) {
      const int64_t label = first + i;
      for (int64_t c = 0; c < f; c += W) {
        const V teacher = weights(op_.teacher, label, c);
        store_part(to + c, weights(op_.student, label, c) - teacher, f - c);
        store_part(to + f + 1 + c, teacher, f - c);
      }
      to[f] = op_.student_bias[label] - op_.teacher_bias[label];
    }
  }

  // sums += M^T M on and above the diagonal.
  void add_squares(const float* matrix, int64_t n, float* sums) const {
    // A tile that is only partly known is computed whole.
    const int64_t rows = op_.teacher_known ? op_.channels + 1 : width_;
    for (int64_t i = 0; i < rows; i += OR) {
      for (int64_t j = i / NR * NR; j < padded_; j += NR) {
        V acc[OR][NV] = {};
        accumulate<float>(acc, ColumnUnits{words(matrix) + i, pitch()}, words(matrix) + j, n, pitch());
        put_tile(acc, true, sums + i * padded_ + j, padded_);
      }
    }
  }

  void put_weight(int64_t first, int64_t n, const float* matrix, float* d) const {
    cover(n, [&](auto size, int64_t label) {
      constexpr int R = decltype(size)::value;
      for (int64_t c = 0; c < columns_; c += NR) {
        V acc[R][NV] = {};
        accumulate<float>(acc, StridedRows{words(matrix) + label * pitch(), pitch()}, words(moments_.get()) + c * width_, width_);
        put_tile(acc, false, d + c, columns_);
      }
      for (int64_t i = 0; i < R; ++i) {
        if (op_.d_weight.wanted()) put_row(op_.d_weight, false, first + label + i, op_.channels, d + i * columns_);
        if (op_.d_bias == nullptr) continue;
        V total = {};
        for (int64_t c = 0; c < width_; c += W) {
          total += load_part(matrix + (label + i) * pitch() + c, width_ - c) * load_part(op_.bias_moments + c, width_ - c);
        }
        op_.d_bias[first + label + i] = sum(total);
      }
    });
  }

  const RetentionGram& op_;
  int64_t width_, padded_, columns_;
  Array<float> moments_;
  Array<const double*> partials_;
};

static void retention_gram(const RetentionGram& op) {
  GramPass pass(op);
  in_parallel(op.threads, [&] { pass.run(); });
}

}  // namespace TERACON_ISA
}  // namespace teracon
