// The cross-entropy of a linear head for one instruction set. Included by isa_*.cpp after masked_conv_impl.h, whose vectors and
// register tiles it uses.
// Logits are formed transposed, a tile of labels by a panel of NR rows: weights are then read as they are stored, and sums over
// labels are sums of vectors. Threads own fixed ranges of blocks of labels, and what they sum over labels is added in thread
// order, so results depend on the number of threads only.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

// Rows whose probabilities under a block of labels stay in the second-level cache between the two products that read them.
constexpr int64_t kPanelsAtOnce = 256 / NR;

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

static TERACON_INLINE V larger(V value, V than) { return value > than ? value : than; }  // `than` where value is a NaN

// Row i of a tile starts i * stride units after the first.
struct StridedRows {
  const Word* first;
  int64_t stride;
  TERACON_INLINE const Word* operator()(int i, int64_t p) const { return first + i * stride + p; }
};

static TERACON_INLINE const Word* words(const float* p) { return reinterpret_cast<const Word*>(p); }

// fn(size, first row) for tiles that cover n rows: as many of MR as fit, then ones that still keep the units busy.
template <class Fn>
static TERACON_INLINE void cover(int64_t n, const Fn& fn) {
  int64_t row = 0;
  for (; n - row >= MR; row += MR) fn(std::integral_constant<int, MR>{}, row);
  if (MR > 8 && n - row >= 8) fn(std::integral_constant<int, 8>{}, row), row += 8;
  if (n - row >= 4) fn(std::integral_constant<int, 4>{}, row), row += 4;
  if (n - row >= 2) fn(std::integral_constant<int, 2>{}, row), row += 2;
  if (n - row >= 1) fn(std::integral_constant<int, 1>{}, row);
}

// out[i] = bias[i] + weight[i] . panel for R labels and NR rows of hidden states; `top` becomes the highest per row.
template <int R>
static void logits_tile(const float* weight, const float* bias, const Word* panel, int64_t channels, float* out, V (&top)[NV]) {
  V acc[R][NV];
  for_tile<R>(acc, [&](V& v, int i, int) { v = splat(bias[i]); });
  accumulate<float>(acc, StridedRows{words(weight), channels}, panel, channels);
  for_tile<R>(acc, [&](V& v, int i, int j) {
    store(out + i * NR + j, v);
    top[j / W] = larger(v, top[j / W]);
  });
}

// to[i] (+)= acc[i]. Added last: many small products added one by one to a large sum would lose more to rounding.
template <int R>
static TERACON_INLINE void put_tile(V (&acc)[R][NV], bool add, float* to, int64_t ldc) {
  if (add) for_tile<R>(acc, [&](V& v, int i, int j) { v += load(to + i * ldc + j); });
  for_tile<R>(acc, [&](V& v, int i, int j) { store(to + i * ldc + j, v); });
}

// to[i] (+)= sum over n labels of weight[label, i] * probability[label], for R channels and NR rows.
template <int R>
static void hidden_tile(const float* weight, int64_t channels, const float* probability, int64_t n, bool add, float* to) {
  V acc[R][NV] = {};
  accumulate<float>(acc, ColumnUnits{words(weight), channels}, words(probability), n);
  put_tile<R>(acc, add, to, NR);
}

// to[i] (+)= sum over the rows of `panels` panels of probability[i, row] * hidden[row], for R labels and NR channels.
template <int R>
static void weight_tile(const float* probability, int64_t panel_size, int64_t panels, const Word* hidden, bool add, float* to,
                        int64_t ldc) {
  V acc[R][NV] = {};
  for (int64_t p = 0; p < panels; ++p) {
    accumulate<float>(acc, StridedRows{words(probability + p * panel_size), NR}, hidden + p * NR * NR, NR);
  }
  put_tile<R>(acc, add, to, ldc);
}

// A head's rows as panels of NR, and what threads share of its labels.
struct HeadPlan {
  const LinearCrossEntropy& op;
  const int64_t panels, padded, width;

  explicit HeadPlan(const LinearCrossEntropy& op)
      : op(op), panels(op.padded_rows() / NR), padded(op.padded_rows()), width(round_up(op.channels, NR)) {}

  int64_t first(int64_t block) const { return block * op.block; }
  int64_t labels(int64_t block) const { return std::min(op.block, op.labels - first(block)); }

  // Panels [panels][channels][NR] of the hidden states, zero in rows that are not there.
  void to_panel(int64_t panel, float* to) const {
    for (int64_t row = panel * NR; row < (panel + 1) * NR; row += W) {
      for (int64_t c = 0; c < op.channels; c += W) {
        const int64_t left = op.channels - c;
        V v[W];
        for (int i = 0; i < W; ++i) v[i] = row + i < op.rows ? load_part(op.hidden + (row + i) * op.channels + c, left) : V{};
        transpose(v);
        for (int k = 0; k < W && k < left; ++k) store(to + (panel * op.channels + c + k) * NR + row % NR, v[k]);
      }
    }
  }

  // The opposite, of the sums of `count` such arrays of panels.
  void from_panels(int64_t panel, const float* const* arrays, int count, float* to) const {
    for (int64_t row = panel * NR; row < (panel + 1) * NR; row += W) {
      for (int64_t c = 0; c < op.channels; c += W) {
        const int64_t left = op.channels - c;
        V v[W] = {};
        for (int k = 0; k < W && k < left; ++k) {
          for (int t = 0; t < count; ++t) v[k] += load(arrays[t] + (panel * op.channels + c + k) * NR + row % NR);
        }
        transpose(v);
        for (int i = 0; i < W && row + i < op.rows; ++i) store_part(to + (row + i) * op.channels + c, v[i], left);
      }
    }
  }

  // Panels [column tiles][padded rows][NR] of the hidden states, zero in rows and channels that are not there.
  void columns(int64_t panel, float* to) const {
    for (int64_t row = panel * NR; row < (panel + 1) * NR; ++row) {
      for (int64_t c = 0; c < width; c += W) {
        const int64_t left = op.channels - c;
        const V v = row < op.rows && left > 0 ? load_part(op.hidden + row * op.channels + c, left) : V{};
        store(to + (c / NR * padded + row) * NR + c % NR, v);
      }
    }
  }

  // Where forward keeps the exponentials of a block under a panel, [labels][NR].
  float* kept(const KeptLogits& kept, int64_t block, int64_t panel) const {
    return kept.exponentials + first(block) * padded + panel * labels(block) * NR;
  }

  // Logits of a block of labels under a panel of rows, [labels][NR].
  void logits(int64_t block, const float* transposed, int64_t panel, float* out, V (&top)[NV]) const {
    const int64_t f = op.channels, begin = first(block);
    cover(labels(block), [&](auto size, int64_t label) {
      logits_tile<decltype(size)::value>(op.weight + (begin + label) * f, op.bias + begin + label,
                                         words(transposed + panel * f * NR), f, out + label * NR, top);
    });
  }
};

// Walks a block's targets along its panels.
class BlockTargets {
 public:
  BlockTargets(const LinearCrossEntropy& op, const TargetOrder& order, int64_t block)
      : op_(op), at_(order.by_block + order.block_offsets[block]),
        end_(order.by_block + order.block_offsets[block + 1]), first_(block * op.block) {}
  // fn(target, its place in [labels][NR]) for the next panel's targets.
  template <class Fn>
  void in_panel(int64_t panel, const Fn& fn) {
    for (; at_ < end_ && op_.row_of[*at_] < (panel + 1) * NR; ++at_) {
      fn(*at_, (op_.targets[*at_] - first_) * NR + op_.row_of[*at_] - panel * NR);
    }
  }

 private:
  const LinearCrossEntropy& op_;
  const int64_t *at_, *end_;
  int64_t first_;
};

// One thread's statistics of each row over its labels. Maxima begin finite: -inf less itself would be NaN.
struct RunningSums {
  RunningSums(int64_t padded) : maximum(padded), sum(padded, true) {
    for (int64_t i = 0; i < padded; i += W) store(maximum.get() + i, V{} - kLowest);
  }
  static constexpr float kLowest = 3.40282347e38f;
  Array<float> maximum, sum;
};

static void head_forward(const LinearCrossEntropy& op, const HeadStatistics& statistics, const KeptLogits& kept, float* losses) {
  const HeadPlan plan(op);
  const TargetOrder order(op);
  Array<float> transposed(plan.padded * op.channels);
  Array<float> logarithm(plan.padded);
  Array<RunningSums*> partials(op.threads);
  in_parallel(op.threads, [&] {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    RunningSums own(plan.padded);
    partials.get()[thread] = &own;
    Array<float> scratch(op.block * NR);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < plan.panels; ++panel) plan.to_panel(panel, transposed.get());
    int64_t low, high;
    share(op.blocks(), threads, thread, &low, &high);
    for (int64_t block = low; block < high; ++block) {
      const int64_t n = plan.labels(block);
      BlockTargets targets(op, order, block);
      for (int64_t panel = 0; panel < plan.panels; ++panel) {
        float* e = kept.exponentials == nullptr ? scratch.get() : plan.kept(kept, block, panel);
        float *maximum = own.maximum.get() + panel * NR, *sum = own.sum.get() + panel * NR;
        V top[NV], before[NV], total[NV] = {};
        for (int j = 0; j < NV; ++j) top[j] = before[j] = load(maximum + j * W);
        plan.logits(block, transposed.get(), panel, e, top);
        targets.in_panel(panel, [&](int64_t target, int64_t at) { losses[target] = e[at]; });
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
          if (kept.exponentials != nullptr) store(kept.highest + block * plan.padded + panel * NR + j * W, top[j]);
        }
      }
    }
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
      for (int64_t i = row; i < std::min(row + W, op.rows); ++i) logarithm.get()[i] = std::log(statistics.sum[i]);
    }
    // Until here a target's loss is its logit. Differences first: the loss of a certain label is far below its logit.
#pragma omp for schedule(static)
    for (int64_t n = 0; n < op.count; ++n) {
      const int64_t row = op.row_of[n];
      losses[n] = (statistics.maximum[row] - losses[n]) + logarithm.get()[row];
    }
  });
}

// What each row's exponentials are multiplied by, and the maximum that they refer to: 0 and infinity for rows that are not there.
struct RowScales {
  RowScales(const LinearCrossEntropy& op, const HeadPlan& plan, const TargetOrder& order, const HeadStatistics& statistics,
            const float* grad)
      : scale(plan.padded), maximum(plan.padded) {
    for (int64_t row = 0; row < plan.padded; ++row) {
      float weight = 0.0f;
      for (int64_t i = row < op.rows ? order.row_offsets[row] : 0; row < op.rows && i < order.row_offsets[row + 1]; ++i) {
        weight += grad[order.by_row[i]];
      }
      scale.get()[row] = row < op.rows ? weight / statistics.sum[row] : 0.0f;
      maximum.get()[row] = row < op.rows ? statistics.maximum[row] : std::numeric_limits<float>::infinity();
    }
  }
  Array<float> scale, maximum;
};

static void head_backward(const LinearCrossEntropy& op, const HeadStatistics& statistics, const KeptLogits& kept,
                          const LinearCrossEntropyBackward& io) {
  const int64_t f = op.channels;
  const HeadPlan plan(op);
  const TargetOrder order(op);
  const RowScales scales(op, plan, order, statistics, io.grad);
  const bool recompute = kept.exponentials == nullptr;
  Array<float> transposed(recompute ? plan.padded * f : 0);
  Array<float> columns(io.d_weight == nullptr ? 0 : plan.padded * plan.width);
  Array<const float*> partials(op.threads);
  in_parallel(op.threads, [&] {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t low, high;
    share(op.blocks(), threads, thread, &low, &high);
    // Transposed as the panels are: [panels][channels][NR].
    Array<float> d_hidden(io.d_hidden == nullptr ? 0 : plan.padded * f);
    Array<float> probabilities(kPanelsAtOnce * op.block * NR), d_weight(op.block * plan.width), d_bias(op.block * W);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < plan.panels; ++panel) {
      if (recompute) plan.to_panel(panel, transposed.get());
      if (io.d_weight != nullptr) plan.columns(panel, columns.get());
    }
    for (int64_t block = low; block < high; ++block) {
      const int64_t n = plan.labels(block), begin = plan.first(block), panel_size = n * NR;
      BlockTargets targets(op, order, block);
      std::memset(d_bias.get(), 0, sizeof(float) * n * W);
      for (int64_t from = 0; from < plan.panels; from += kPanelsAtOnce) {
        const int64_t count = std::min(kPanelsAtOnce, plan.panels - from);
        for (int64_t panel = from; panel < from + count; ++panel) {
          float* p = probabilities.get() + (panel - from) * panel_size;
          V scale[NV], maximum[NV];
          for (int j = 0; j < NV; ++j) {
            scale[j] = load(scales.scale.get() + panel * NR + j * W);
            maximum[j] = load(scales.maximum.get() + panel * NR + j * W);
          }
          const auto for_label = [&](const float* e, auto value) {
            for (int64_t label = 0; label < n; ++label) {
              V total = load(d_bias.get() + label * W);
              for (int j = 0; j < NV; ++j) {
                const V v = value(load(e + label * NR + j * W), j);
                store(p + label * NR + j * W, v);
                total += v;
              }
              store(d_bias.get() + label * W, total);
            }
          };
          if (recompute) {
            V top[NV] = {};
            plan.logits(block, transposed.get(), panel, p, top);
            for_label(p, [&](V logit, int j) { return exponential(logit - maximum[j]) * scale[j]; });
          } else {
            for (int j = 0; j < NV; ++j) {
              scale[j] *= exponential(load(kept.highest + block * plan.padded + panel * NR + j * W) - maximum[j]);
            }
            for_label(plan.kept(kept, block, panel), [&](V e, int j) { return e * scale[j]; });
          }
          targets.in_panel(panel, [&](int64_t target, int64_t at) {
            p[at] -= io.grad[target];
            d_bias.get()[at / NR * W] -= io.grad[target];
          });
          if (io.d_hidden != nullptr) {
            cover(f, [&](auto size, int64_t c) {
              hidden_tile<decltype(size)::value>(op.weight + begin * f + c, f, p, n, block > low,
                                                 d_hidden.get() + (panel * f + c) * NR);
            });
          }
        }
        if (io.d_weight == nullptr) continue;
        for (int64_t c = 0; c < plan.width; c += NR) {
          cover(n, [&](auto size, int64_t label) {
            weight_tile<decltype(size)::value>(probabilities.get() + label * NR, panel_size, count,
                                               words(columns.get() + c * plan.padded + from * NR * NR), from > 0,
                                               d_weight.get() + label * plan.width + c, plan.width);
          });
        }
      }
      for (int64_t label = 0; label < n; ++label) {
        io.d_bias[begin + label] = sum(load(d_bias.get() + label * W)) + (io.add ? io.d_bias[begin + label] : 0.0f);
        if (io.d_weight == nullptr) continue;
        const float* from = plan.panels == 0 ? nullptr : d_weight.get() + label * plan.width;
        float* to = io.d_weight + (begin + label) * f;
        for (int64_t c = 0; c < f; c += W) {
          const V own = from == nullptr ? V{} : load(from + c);
          store_part(to + c, io.add ? load_part(to + c, f - c) + own : own, f - c);
        }
      }
    }
    if (io.d_hidden != nullptr) {
      // Sums over the threads that had labels, in thread order.
      partials.get()[thread] = low < high ? d_hidden.get() : nullptr;
#pragma omp barrier
      Array<const float*> present(threads);
      int count = 0;
      for (int t = 0; t < threads; ++t) {
        if (partials.get()[t] != nullptr) present.get()[count++] = partials.get()[t];
      }
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < plan.panels; ++panel) plan.from_panels(panel, present.get(), count, io.d_hidden);
    }
  });
}

}  // namespace TERACON_ISA
}  // namespace teracon
