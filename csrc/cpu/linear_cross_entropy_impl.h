// The cross-entropy of a linear head for one instruction set and both element types. Included by isa_*.cpp after head_impl.h and
// linear_rank_impl.h.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

// exp(x) for x at most 88, to an ulp; 0 below -87.3, where the result would be no normal number. A NaN stays one.
// 2^n * exp(r), |r| <= ln(2) / 2; the polynomial is a minimax fit of (exp(r) - 1 - r) / r^2, weighted by r^2 / exp(r).
static TERACON_INLINE V exponential(V x) {
  const float shift = 12583039.0f;  // 1.5 * 2^23 + 127: the sum's lowest bits are n + 127, the exponent of 2^n
  const V shifted = x * 1.44269504f + shift, n = shifted - shift;
  const V r = x - n * 0.693359375f - n * -2.12194440e-4f;
  V q = r * 0x1.6a23dp-10f + 0x1.123a2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const U power = reinterpret_cast<const U&>(shifted) << 23;
  const V value = (q * r * r + r + 1.0f) * reinterpret_cast<const V&>(power);
  return x < V{} - 87.3f ? V{} : value;
}

// Where forward keeps the exponentials of a block under a panel, [labels][NR].
template <class E>
static float* kept_at(const Head<E>& op, const KeptLogits& kept, int64_t block, int64_t panel) {
  return kept.exponentials + op.first(block) * op.padded_rows() + panel * op.labels_of(block) * NR;
}

// One thread's statistics of each row over its labels. Maxima begin finite: -inf less itself would be NaN.
struct RunningSums {
  RunningSums(int64_t padded) : maximum(padded), sum(padded, true) {
    for (int64_t i = 0; i < padded; i += W) store(maximum.get() + i, V{} - kLowest);
  }
  static constexpr float kLowest = 3.40282347e38f;
  Array<float> maximum, sum;
};

template <class E>
static void cross_entropy(const Head<E>& op, const Targets& targets, const HeadStatistics& statistics, const KeptLogits& kept,
                          const Predictions& predictions, float* losses) {
  const TargetOrder order(targets, op.rows, op.blocks(), op.block);
  const bool predict = predictions.rank != nullptr;
  HeadRows<E> rows(op, false);
  RankSlots<E> slots(op, targets, order, rows, predict);
  BestLabels best(op.threads, predict ? rows.panels * NR : 0);
  const int64_t padded = op.padded_rows();
  Array<float> logarithm(padded);
  Array<RunningSums*> partials(op.threads);
  in_parallel(op.threads, [&] {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    RunningSums own(padded);
    partials.get()[thread] = &own;
    Array<float> scratch(op.block * NR);
    const BlockWeights<E> weights(op);
    rows.pack();
    slots.fill();
    RankCounts counts(slots.size());
    int64_t low, high;
    share(op.blocks(), threads, thread, &low, &high);
    for (int64_t block = low; block < high; ++block) {
      const int64_t n = op.labels_of(block), first = op.first(block);
      const BothWays weight = weights.of(first, n);
      BlockTargets within(targets, order, block, first);
      for (int64_t panel = 0; panel < rows.panels; ++panel) {
        float* e = kept.exponentials == nullptr ? scratch.get() : kept_at(op, kept, block, panel);
        float *maximum = own.maximum.get() + panel * NR, *sum = own.sum.get() + panel * NR;
        V top[NV], before[NV], total[NV] = {};
        for (int j = 0; j < NV; ++j) top[j] = before[j] = load(maximum + j * W);
        block_logits(op, weight, first, n, rows, panel, e, top);
        within.in_panel(panel, [&](int64_t target, int64_t at) { losses[target] = e[at]; });
        if (predict) {
          slots.count(panel, first, n, e, counts);
          best.add(thread, panel, first, n, e);
        }
        for (int64_t label = 0; label < n; ++label) {
          for (int j = 0; j < NV; ++j) {
            const V value = exponential(load(e + label * NR + j * W) - top[j]);
            if (kept.exponentials != nullptr) store(e + label * NR + j * W, value);
            total[j] += value;
          }
        }
        for (int j = 0; j < NV; ++j) {
          store(sum + j * W, load(sum + j * W) * exponential(before[j] - top[j]) + total[j]);
          store(maximum + j * W, top[j]);
          if (kept.exponentials != nullptr) store(kept.highest + block * padded + panel * NR + j * W, top[j]);
        }
      }
    }
    if (predict) slots.finish(counts, predictions.rank);
#pragma omp barrier
    // Sums over threads, in thread order.
#pragma omp for schedule(static)
    for (int64_t row = 0; row < op.rows; row += W) {
      V maximum = V{} - RunningSums::kLowest, sum = V{};
      for (int t = 0; t < threads; ++t) maximum = larger(load(partials.get()[t]->maximum.get() + row), maximum);
      for (int t = 0; t < threads; ++t) {
        const RunningSums& part = *partials.get()[t];
        sum += load(part.sum.get() + row) * exponential(load(part.maximum.get() + row) - maximum);
      }
      store_part(statistics.maximum + row, maximum, op.rows - row);
      store_part(statistics.sum + row, sum, op.rows - row);
      for (int64_t i = row; i < std::min(row + W, op.rows); ++i) {
        logarithm.get()[i] = std::log(statistics.sum[i]);
        if (predict) predictions.best[i] = best.of(i, threads);
      }
    }
    // Until here a target's loss is its logit. Differences first: the loss of a certain label is far below its logit.
#pragma omp for schedule(static)
    for (int64_t n = 0; n < targets.count; ++n) {
      const int64_t row = targets.row_of[n];
      losses[n] = (statistics.maximum[row] - losses[n]) + logarithm.get()[row];
    }
  });
}

// What turns each row's exponentials into probabilities, the maximum that they refer to, and the sum of the gradients of its
// targets: 0, infinity and 0 for rows that are not there.
struct RowScales {
  template <class E>
  RowScales(const Head<E>& op, const TargetOrder& order, const HeadStatistics& statistics, const float* grad)
      : inverse(op.padded_rows()), maximum(op.padded_rows()), gradient(op.padded_rows()) {
    for (int64_t row = 0; row < op.padded_rows(); ++row) {
      float sum = 0.0f;
      for (int64_t i = row < op.rows ? order.row_offsets[row] : 0; row < op.rows && i < order.row_offsets[row + 1]; ++i) {
        sum += grad[order.by_row[i]];
      }
      inverse.get()[row] = row < op.rows ? 1.0f / statistics.sum[row] : 0.0f;
      maximum.get()[row] = row < op.rows ? statistics.maximum[row] : std::numeric_limits<float>::infinity();
      gradient.get()[row] = sum;
    }
  }
  Array<float> inverse, maximum, gradient;
};

// d_logit = probability * gradient of the row, less the gradient of each target.
template <class E>
class CrossEntropyForm {
 public:
  CrossEntropyForm(const Head<E>& op, const HeadRows<E>& rows, const Targets& targets, const TargetOrder& order,
                   const RowScales& scales, const KeptLogits& kept, const LinearCrossEntropyBackward& io)
      : op_(op), rows_(rows), targets_(targets), order_(order), scales_(scales), kept_(kept), io_(io), within_(targets, order, 0, 0) {}

  void begin(int64_t block, int64_t first, int64_t n, const BothWays& weight) {
    block_ = block, first_ = first, n_ = n, weight_ = weight;
    within_ = BlockTargets(targets_, order_, block, first);
  }

  void operator()(int64_t panel, float* d, bool* active) {
    V inverse[NV], maximum[NV], gradient[NV];
    for (int j = 0; j < NV; ++j) {
      inverse[j] = load(scales_.inverse.get() + panel * NR + j * W);
      maximum[j] = load(scales_.maximum.get() + panel * NR + j * W);
      gradient[j] = load(scales_.gradient.get() + panel * NR + j * W);
    }
    if (kept_.exponentials == nullptr) {
      V top[NV] = {};
      block_logits(op_, weight_, first_, n_, rows_, panel, d, top);
      each(d, d, gradient, active, [&](V logit, int j) { return exponential(logit - maximum[j]) * inverse[j]; });
    } else {
      for (int j = 0; j < NV; ++j) {
        inverse[j] *= exponential(load(kept_.highest + block_ * op_.padded_rows() + panel * NR + j * W) - maximum[j]);
      }
      each(kept_at(op_, kept_, block_, panel), d, gradient, active, [&](V e, int j) { return e * inverse[j]; });
    }
    within_.in_panel(panel, [&](int64_t target, int64_t at) {
      d[at] -= io_.grad[target];
      active[at / NR / MR] = true;
    });
    // What is left out of the products is left out of d(bias) too.
    for (int64_t begin = 0; io_.negligible > 0.0f && begin < n_; begin += MR) {
      if (!active[begin / MR]) std::memset(d + begin * NR, 0, sizeof(float) * std::min<int64_t>(MR, n_ - begin) * NR);
    }
  }

 private:
  template <class Probability>
  TERACON_INLINE void each(const float* from, float* d, const V (&gradient)[NV], bool* active, const Probability& probability) const {
    if (io_.negligible > 0.0f) return each_active(from, d, gradient, active, probability);
    for (int64_t label = 0; label < n_; ++label) {
      for (int j = 0; j < NV; ++j) {
        store(d + label * NR + j * W, probability(load(from + label * NR + j * W), j) * gradient[j]);
      }
    }
  }
  template <class Probability>
  TERACON_INLINE void each_active(const float* from, float* d, const V (&gradient)[NV], bool* active,
                                  const Probability& probability) const {
    const V negligible = splat(io_.negligible);
    for (int64_t begin = 0; begin < n_; begin += MR) {
      I matters = {};
      for (int64_t label = begin; label < std::min<int64_t>(begin + MR, n_); ++label) {
        for (int j = 0; j < NV; ++j) {
          const V p = probability(load(from + label * NR + j * W), j);
          matters |= ~(p < negligible);  // also where p is a NaN
          store(d + label * NR + j * W, p * gradient[j]);
        }
      }
      active[begin / MR] = any(matters);
    }
  }

  const Head<E>& op_;
  const HeadRows<E>& rows_;
  const Targets& targets_;
  const TargetOrder& order_;
  const RowScales& scales_;
  const KeptLogits& kept_;
  const LinearCrossEntropyBackward& io_;
  BlockTargets within_;
  BothWays weight_{};
  int64_t block_ = 0, first_ = 0, n_ = 0;
};

template <class E>
static void cross_entropy_backward(const Head<E>& op, const Targets& targets, const HeadStatistics& statistics,
                                   const KeptLogits& kept, const LinearCrossEntropyBackward& io) {
  const TargetOrder order(targets, op.rows, op.blocks(), op.block);
  const RowScales scales(op, order, statistics, io.grad);
  HeadRows<E> rows(op, io.gradients.weight.wanted());
  GradientPass<E> pass(op, rows, io.gradients);
  in_parallel(op.threads, [&] {
    rows.pack();
    CrossEntropyForm<E> form(op, rows, targets, order, scales, kept, io);
    pass.run(form);
  });
}

}  // namespace TERACON_ISA
}  // namespace teracon
