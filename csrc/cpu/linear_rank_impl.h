// Ranking with a linear head for one instruction set and both element types. Included by isa_*.cpp after head_impl.h.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

// One thread's counts of the labels that stand before each target.
struct RankCounts {
  explicit RankCounts(int64_t slots) : before(slots * NR, true) {}
  Array<int32_t> before;
};

// Targets laid along the panels: a panel has as many slots of NR lanes as its row with most targets has.
template <class E>
class RankSlots {
  typedef Operand<E> T;

 public:
  RankSlots(const Head<E>& op, const Targets& targets, const TargetOrder& order, const HeadRows<E>& rows, bool wanted)
      : op_(op), targets_(targets), order_(order), rows_(rows), wanted_(wanted), first_(rows.panels + 1), slot_(wanted ? targets.count : 0),
        own_(count_slots() * NR), label_(size() * NR, true), total_(wanted ? targets.count : 0, true) {
    for (int64_t i = 0; i < size() * NR; i += W) store(own_.get() + i, V{} + std::numeric_limits<float>::infinity());
  }

  int64_t size() const { return first_.get()[rows_.panels]; }

  // The targets' own logits, each by the operations that form it among all others: to the same bits. Every thread of a team calls
  // it, after rows.pack().
  void fill() {
    if (!wanted_) return;
    Array<Word> room(std::max(both_ways_words<T, float>(1, op_.channels), both_ways_words<T, Bf16>(1, op_.channels)));
    const int64_t f = op_.channels;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < targets_.count; ++n) {
      const int64_t label = targets_.labels[n], row = targets_.row_of[n];
      const BothWays weight = op_.weight.half == nullptr ? both_ways<T>(op_.weight.single + label * f, f, 1, f, room.get())
                                                         : both_ways<T>(op_.weight.half + label * f, f, 1, f, room.get());
      float logits[NR];
      V top[NV] = {};
      logits_tile<T, 1>(weight.row(0), op_.bias + label, rows_.panel(row / NR), rows_.units, logits, top);
      own_.get()[slot_.get()[n]] = logits[row % NR];
      label_.get()[slot_.get()[n]] = static_cast<int32_t>(label);
    }
  }

  // Counts those of n labels that stand before the panel's targets.
  void count(int64_t panel, int64_t first, int64_t n, const float* logits, const RankCounts& counts) const {
    for (int64_t slot = first_.get()[panel]; slot < first_.get()[panel + 1]; ++slot) {
      for (int64_t at = slot * NR; at < (slot + 1) * NR; at += W) {
        const V own = load(own_.get() + at);
        const I target = load(label_.get() + at);
        I before = load(counts.before.get() + at), label = I{} + static_cast<int32_t>(first);
        const float* from = logits + at % NR;
        for (int64_t i = 0; i < n; ++i, from += NR, label += 1) {
          const V v = load(from);
          before -= ~(v <= own) | ((v == own) & (label < target));
        }
        store(counts.before.get() + at, before);
      }
    }
  }

  // Sums over threads. Every thread of a team calls it.
  void finish(const RankCounts& counts, int64_t* ranks) {
#pragma omp critical(teracon_rank_slots)
    for (int64_t n = 0; n < targets_.count; ++n) total_.get()[n] += counts.before.get()[slot_.get()[n]];
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t n = 0; n < targets_.count; ++n) ranks[n] = total_.get()[n];
  }

 private:
  int64_t count_slots() {
    int64_t slots = 0;
    for (int64_t panel = 0; panel < rows_.panels; ++panel) {
      int64_t most = 0;
      for (int64_t row = panel * NR; wanted_ && row < std::min<int64_t>((panel + 1) * NR, op_.rows); ++row) {
        const int64_t begin = order_.row_offsets[row], end = order_.row_offsets[row + 1];
        for (int64_t i = begin; i < end; ++i) slot_.get()[order_.by_row[i]] = (slots + i - begin) * NR + row % NR;
        most = std::max(most, end - begin);
      }
      first_.get()[panel] = slots;
      slots += most;
    }
    return first_.get()[rows_.panels] = slots;
  }

  const Head<E>& op_;
  const Targets& targets_;
  const TargetOrder& order_;
  const HeadRows<E>& rows_;
  bool wanted_;
  Array<int64_t> first_, slot_;
  Array<float> own_;
  Array<int32_t> label_;
  Array<int64_t> total_;
};

// Each thread's label of the highest logit of every row.
class BestLabels {
 public:
  BestLabels(int threads, int64_t rows) : rows_(rows), score_(threads * rows), label_(threads * rows, true) {
    for (int64_t i = 0; i < threads * rows; i += W) store(score_.get() + i, V{} - std::numeric_limits<float>::infinity());
  }
  void add(int thread, int64_t panel, int64_t first, int64_t n, const float* logits) {
    for (int64_t j = 0; j < NR; j += W) {
      const int64_t at = thread * rows_ + panel * NR + j;
      V score = load(score_.get() + at);
      I best = load(label_.get() + at), label = I{} + static_cast<int32_t>(first);
      for (int64_t i = 0; i < n; ++i, label += 1) {
        const V v = load(logits + i * NR + j);
        best = v > score ? label : best;
        score = larger(v, score);
      }
      store(score_.get() + at, score);
      store(label_.get() + at, best);
    }
  }
  int64_t of(int64_t row, int threads) const {
    int best = 0;
    for (int t = 1; t < threads; ++t) {
      if (score_.get()[t * rows_ + row] > score_.get()[best * rows_ + row]) best = t;
    }
    return label_.get()[best * rows_ + row];
  }

 private:
  int64_t rows_;
  Array<float> score_;
  Array<int32_t> label_;
};

// use(panel, first label, n, logits [n][NR], highest logit of each row) for a thread's blocks of labels; whether a logit is a NaN.
template <class E, class Use>
static bool for_logits(const Head<E>& op, const HeadRows<E>& rows, const Use& use) {
  int64_t low, high;
  share(op.blocks(), omp_get_num_threads(), omp_get_thread_num(), &low, &high);
  const BlockWeights<E> weights(op);
  Array<float> logits(op.block * NR);
  bool nan = false;
  for (int64_t block = low; block < high; ++block) {
    const int64_t n = op.labels_of(block), first = op.first(block);
    const BothWays weight = weights.of(first, n);
    for (int64_t panel = 0; panel < rows.panels; ++panel) {
      V top[NV];
      for (int j = 0; j < NV; ++j) top[j] = V{} - std::numeric_limits<float>::infinity();
      block_logits(op, weight, first, n, rows, panel, logits.get(), top);
      nan = nan || has_nan(rows, panel, n, logits.get());
      use(panel, first, n, logits.get(), top);
    }
  }
  return nan;
}

template <class E>
static bool rank(const Head<E>& op, const Targets& targets, int64_t* ranks) {
  const TargetOrder order(targets, op.rows, op.blocks(), op.block);
  HeadRows<E> rows(op, false);
  RankSlots<E> slots(op, targets, order, rows, true);
  Array<bool> nan(op.threads, true);
  in_parallel(op.threads, [&] {
    rows.pack();
    slots.fill();
    RankCounts counts(slots.size());
    nan.get()[omp_get_thread_num()] = for_logits(op, rows, [&](int64_t panel, int64_t first, int64_t n, const float* logits, V (&)[NV]) {
      slots.count(panel, first, n, logits, counts);
    });
    slots.finish(counts, ranks);
  });
  bool found = false;
  for (int t = 0; t < op.threads; ++t) found = found || nan.get()[t];
  return found;
}

template <class E>
static bool top(const Head<E>& op, const TopLabels& io) {
  HeadRows<E> rows(op, false);
  Array<bool> nan(op.threads, true);
  Array<TopHeap*> heaps(op.threads * op.rows);
  in_parallel(op.threads, [&] {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    rows.pack();
    Array<float> scores(op.rows * io.k);
    Array<int32_t> labels(op.rows * io.k);
    Array<TopHeap> own(op.rows);
    Array<float> threshold(rows.panels * NR);
    for (int64_t row = 0; row < rows.panels * NR; ++row) {
      if (row < op.rows) {
        heaps.get()[thread * op.rows + row] = new (own.get() + row) TopHeap(io.k, scores.get() + row * io.k, labels.get() + row * io.k);
      }
      // Rows that are not there take nothing.
      threshold.get()[row] = row < op.rows ? own.get()[row].threshold() : std::numeric_limits<float>::infinity();
    }
    nan.get()[thread] = for_logits(op, rows, [&](int64_t panel, int64_t first, int64_t n, const float* logits, V (&highest)[NV]) {
      for (int64_t j = 0; j < NR; j += W) {
        const I candidates = ~(highest[j / W] <= load(threshold.get() + panel * NR + j));
        if (!any(candidates)) continue;
        int32_t lanes[W];
        store(lanes, candidates);
        for (int64_t i = 0; i < W; ++i) {
          const int64_t row = panel * NR + j + i;
          if (!lanes[i] || row >= op.rows) continue;
          float bound = threshold.get()[row];
          for (int64_t label = 0; label < n; ++label) {
            const float score = logits[label * NR + j + i];
            if (score <= bound || is_excluded(io, row, first + label)) continue;
            own.get()[row].push(score, static_cast<int32_t>(first + label));
            bound = own.get()[row].threshold();
          }
          threshold.get()[row] = bound;
        }
      }
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < op.rows; ++row) {
      Array<const TopHeap*> of_row(threads);
      for (int t = 0; t < threads; ++t) of_row.get()[t] = heaps.get()[t * op.rows + row];
      merge(io, row, of_row.get(), threads);
    }
  });
  bool found = false;
  for (int t = 0; t < op.threads; ++t) found = found || nan.get()[t];
  return found;
}

}  // namespace TERACON_ISA
}  // namespace teracon
