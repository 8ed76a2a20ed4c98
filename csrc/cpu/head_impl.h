// What the operations on linear heads share, for one instruction set and both element types. Included by isa_*.cpp after
// masked_conv_impl.h, whose vectors and register tiles it uses.
// Logits are formed transposed, a tile of labels by a panel of NR rows: weights are then read as they are stored, and sums over
// labels are sums of vectors. Threads own fixed ranges of blocks of labels, and what they sum over labels is added in thread
// order, so results depend on the number of threads only.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

typedef int32_t I __attribute__((vector_size(4 * TERACON_LANES), may_alias));
typedef int32_t StoredI __attribute__((vector_size(4 * TERACON_LANES), aligned(4), may_alias));

static TERACON_INLINE I load(const int32_t* p) { return *reinterpret_cast<const StoredI*>(p); }
static TERACON_INLINE void store(int32_t* p, I v) { *reinterpret_cast<StoredI*>(p) = v; }

static TERACON_INLINE V larger(V value, V than) { return value > than ? value : than; }  // `than` where value is a NaN

static TERACON_INLINE bool any(I truths) {
  int32_t parts[W], all = 0;
  store(parts, truths);
  for (int i = 0; i < W; ++i) all |= parts[i];
  return all != 0;
}

static TERACON_INLINE const Word* words(const float* p) { return reinterpret_cast<const Word*>(p); }

// Row i of a tile starts i * stride units after the first.
struct StridedRows {
  const Word* first;
  int64_t stride;
  TERACON_INLINE const Word* operator()(int i, int64_t p) const { return first + i * stride + p; }
};

template <class T>
static inline int64_t units_of(int64_t n) {
  return (n + Units<T>::kDepth - 1) / Units<T>::kDepth;
}

// A block [n][width] as the left operand of products over its columns (`rows`) and over its rows (`columns`).
struct BothWays {
  const Word *rows, *columns;
  int64_t row_stride, column_stride;
  TERACON_INLINE StridedRows row(int64_t i) const { return {rows + i * row_stride, row_stride}; }
  TERACON_INLINE ColumnUnits column(int64_t c) const { return {columns + c, column_stride}; }
};

// Floats that are multiplied as floats are read in place; others need memory for operands.
template <class T, class S>
static inline int64_t both_ways_words(int64_t n, int64_t width) {
  if (std::is_same<T, float>::value && std::is_same<S, float>::value) return 0;
  const int64_t padded = round_up(width, W);
  return std::is_same<T, float>::value ? n * padded : n * padded / 2 + units_of<T>(n) * padded;
}

template <class T, class S>
static BothWays both_ways(const S* from, int64_t pitch, int64_t n, int64_t width, Word* room) {
  if constexpr (std::is_same<T, S>::value && std::is_same<T, float>::value) {
    static_cast<void>(n), static_cast<void>(width), static_cast<void>(room);
    return {words(from), words(from), pitch, pitch};
  } else if constexpr (std::is_same<T, float>::value) {
    const int64_t padded = round_up(width, W);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < width; c += W) {
        store(reinterpret_cast<float*>(room) + i * padded + c, load_part(from + i * pitch + c, width - c));
      }
    }
    return {room, room, padded, padded};
  } else {
    const int64_t padded = round_up(width, W);
    Word* columns = room + n * padded / 2;
    Bf16* rows = reinterpret_cast<Bf16*>(room);
    for (int64_t i = 0; i < n; i += 2) {
      for (int64_t c = 0; c < width; c += W) {
        const int64_t left = width - c;
        V v[2];
        v[0] = load_part(from + i * pitch + c, left);
        v[1] = i + 1 < n ? load_part(from + (i + 1) * pitch + c, left) : V{};
        store(rows + i * padded + c, v[0]);
        if (i + 1 < n) store(rows + (i + 1) * padded + c, v[1]);
        const U joined = Units<T>::join(v);
        std::memcpy(columns + i / 2 * padded + c, &joined, sizeof joined);
      }
    }
    return {room, columns, padded / 2, padded};
  }
}

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

// to[i] (+)= acc[i]. Added last: many small products added one by one to a large sum would round more.
template <int R>
static TERACON_INLINE void put_tile(V (&acc)[R][NV], bool add, float* to, int64_t ldc) {
  if (add) for_tile<R>(acc, [&](V& v, int i, int j) { v += load(to + i * ldc + j); });
  for_tile<R>(acc, [&](V& v, int i, int j) { store(to + i * ldc + j, v); });
}

// One thread's weights of a block of labels.
template <class E>
class BlockWeights {
  typedef Operand<E> T;

 public:
  explicit BlockWeights(const Head<E>& op)
      : op_(op),
        room_(op.weight.half == nullptr ? both_ways_words<T, float>(op.block, op.channels)
                                        : both_ways_words<T, Bf16>(op.block, op.channels)) {}
  BothWays of(int64_t first, int64_t n) const {
    const int64_t f = op_.channels;
    return op_.weight.half == nullptr ? both_ways<T>(op_.weight.single + first * f, f, n, f, room_.get())
                                      : both_ways<T>(op_.weight.half + first * f, f, n, f, room_.get());
  }

 private:
  const Head<E>& op_;
  Array<Word> room_;
};

// Rows of hidden states in the order that register tiles read them, times `sign`. Every thread of a team calls pack().
template <class E>
class HeadRows {
  typedef Operand<E> T;
  static constexpr int kDepth = Units<T>::kDepth;

 public:
  HeadRows(const Head<E>& op, bool with_columns, float sign = 1.0f)
      : panels((op.rows + NR - 1) / NR),
        units(units_of<T>(op.channels)),
        width(round_up(op.channels, NR)),
        op_(op),
        with_columns_(with_columns),
        sign_(splat(sign)),
        transposed_(panels * units * NR),
        columns_(with_columns ? panels * NR / kDepth * width : 0) {}

  void pack() {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      transpose_panel(p);
      if (with_columns_) lay_columns(p);
    }
  }

  // [units][NR]: products over channels.
  const Word* panel(int64_t p) const { return transposed_.get() + p * units * NR; }
  // Channels from c on, a multiple of NR, of the rows from panel p on, [row units][NR]: products over rows.
  const Word* columns(int64_t p, int64_t c) const {
    return columns_.get() + (c * panels + p * NR) * NR / kDepth;
  }
  // Units of rows of panel p that are there.
  int64_t row_units(int64_t p) const { return units_of<T>(std::min<int64_t>(NR, op_.rows - p * NR)); }
  // Lanes of vector j of panel p that are rows.
  I present(int64_t p, int j) const {
    int32_t lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = p * NR + j * W + i < op_.rows ? -1 : 0;
    return load(lanes);
  }

  const int64_t panels, units, width;

 private:
  void transpose_panel(int64_t p) {
    for (int64_t row = p * NR; row < (p + 1) * NR; row += W) {
      for (int64_t c = 0; c < op_.channels; c += W) {
        const int64_t left = op_.channels - c;
        V v[W];
        for (int i = 0; i < W; ++i) v[i] = row + i < op_.rows ? load_part(op_.hidden + (row + i) * op_.channels + c, left) * sign_ : V{};
        transpose(v);
        for (int k = 0; k < W && k < left; k += kDepth) put(transposed_.get() + (p * units + (c + k) / kDepth) * NR + row % NR, v + k);
      }
    }
  }
  void lay_columns(int64_t p) {
    for (int64_t row = p * NR; row < (p + 1) * NR; row += kDepth) {
      for (int64_t c = 0; c < width; c += W) {
        const int64_t left = op_.channels - c;
        V v[kDepth];
        for (int s = 0; s < kDepth; ++s) {
          v[s] = row + s < op_.rows && left > 0 ? load_part(op_.hidden + (row + s) * op_.channels + c, left) * sign_ : V{};
        }
        put(columns_.get() + (c / NR * panels * NR + row) / kDepth * NR + c % NR, v);
      }
    }
  }
  static void put(Word* to, const V* rows) {
    const U joined = Units<T>::join(rows);
    std::memcpy(to, &joined, sizeof joined);
  }

  const Head<E>& op_;
  bool with_columns_;
  V sign_;
  Array<Word> transposed_, columns_;
};

// out[i] = bias[i] + weight[i] . panel for R labels and NR rows of hidden states; `top` becomes the highest per row.
template <class T, int R>
static void logits_tile(const StridedRows& weight, const float* bias, const Word* panel, int64_t units, float* out,
                        V (&top)[NV]) {
  V acc[R][NV];
  for_tile<R>(acc, [&](V& v, int i, int) { v = splat(bias[i]); });
  accumulate<T>(acc, weight, panel, units);
  for_tile<R>(acc, [&](V& v, int i, int j) {
    store(out + i * NR + j, v);
    top[j / W] = larger(v, top[j / W]);
  });
}

// Logits of a block of n labels under a panel of rows, [n][NR].
template <class E>
static void block_logits(const Head<E>& op, const BothWays& weight, int64_t first, int64_t n, const HeadRows<E>& rows, int64_t panel,
                         float* out, V (&top)[NV]) {
  cover(n, [&](auto size, int64_t label) {
    logits_tile<Operand<E>, decltype(size)::value>(weight.row(label), op.bias + first + label, rows.panel(panel), rows.units,
                                                   out + label * NR, top);
  });
}

// Whether a logit of a row that is there is a NaN.
template <class E>
static bool has_nan(const HeadRows<E>& rows, int64_t panel, int64_t n, const float* logits) {
  I found = {};
  for (int64_t j = 0; j < NR; j += W) {
    I own = {};
    for (int64_t i = 0; i < n; ++i) {
      const V v = load(logits + i * NR + j);
      own |= v != v;
    }
    found |= own & rows.present(panel, j / W);
  }
  return any(found);
}

// Walks a block's targets along its panels.
class BlockTargets {
 public:
  BlockTargets(const Targets& targets, const TargetOrder& order, int64_t block, int64_t first)
      : targets_(&targets), at_(order.by_block + order.block_offsets[block]),
        end_(order.by_block + order.block_offsets[block + 1]), first_(first) {}
  // fn(target, its place in [labels][NR]) for the next panel's targets.
  template <class Fn>
  void in_panel(int64_t panel, const Fn& fn) {
    for (; at_ < end_ && targets_->row_of[*at_] < (panel + 1) * NR; ++at_) {
      fn(*at_, (targets_->labels[*at_] - first_) * NR + targets_->row_of[*at_] - panel * NR);
    }
  }

 private:
  const Targets* targets_;
  const int64_t *at_, *end_;
  int64_t first_;
};

// Row `label` of d(weight) from its channels, zeros where `from` is null.
static inline void put_row(const MutableMatrix& to, bool add, int64_t label, int64_t f, const float* from) {
  for (int64_t c = 0; c < f; c += W) {
    const V own = from == nullptr ? V{} : load_part(from + c, f - c);
    if (to.half != nullptr) {
      store_part(to.half + label * f + c, own, f - c);
    } else {
      float* const at = to.single + label * f + c;
      store_part(at, add ? load_part(at, f - c) + own : own, f - c);
    }
  }
}

// Rows whose gradients under a block of labels stay in the second-level cache between the two products that read them.
constexpr int64_t kPanelsAtOnce = 256 / NR;

// Gradients of a head from those of its logits. A Form fills in the latter:
//   begin(block, first label, n, weights), then for each panel in turn
//   form(panel, d, active): d[label][NR]; active[tile] for each tile of MR labels, all true before, false where it is to be left out.
template <class E>
class GradientPass {
  typedef Operand<E> T;

 public:
  GradientPass(const Head<E>& op, const HeadRows<E>& rows, const HeadGradients& io) : op_(op), rows_(rows), io_(io), partials_(op.threads) {}

  // Called by every thread of a team, after rows.pack(), with a Form of its own.
  template <class Form>
  void run(Form& form) {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t f = op_.channels, block_size = op_.block * NR, tiles = (op_.block + MR - 1) / MR;
    int64_t low, high;
    share(op_.blocks(), threads, thread, &low, &high);
    const BlockWeights<E> weights(op_);
    // Transposed as the panels are: [panels][channels][NR].
    Array<float> d_hidden(io_.hidden == nullptr ? 0 : rows_.panels * f * NR, true);
    Array<float> d(kPanelsAtOnce * block_size), d_weight(op_.block * rows_.width), d_bias(op_.block * W);
    const int64_t room = both_ways_words<T, float>(op_.block, NR);
    Array<Word> operands(kPanelsAtOnce * room);
    Array<bool> active(kPanelsAtOnce * tiles);
    for (int64_t block = low; block < high; ++block) {
      const int64_t n = op_.labels_of(block), first = op_.first(block);
      const BothWays weight = weights.of(first, n);
      form.begin(block, first, n, weight);
      std::memset(d_bias.get(), 0, sizeof(float) * n * W);
      for (int64_t from = 0; from < rows_.panels; from += kPanelsAtOnce) {
        const int64_t count = std::min(kPanelsAtOnce, rows_.panels - from);
        BothWays parts[kPanelsAtOnce];
        for (int64_t p = 0; p < count; ++p) {
          bool* const here = active.get() + p * tiles;
          std::fill(here, here + tiles, true);
          float* const own = d.get() + p * block_size;
          form(from + p, own, here);
          if (!io_.wanted()) continue;
          sum_rows(own, n, d_bias.get());
          parts[p] = both_ways<T>(own, NR, n, NR, operands.get() + p * room);
          if (io_.hidden != nullptr) add_hidden(weight, n, parts[p], here, d_hidden.get() + (from + p) * f * NR);
        }
        if (io_.weight.wanted()) add_weight(n, from, count, parts, active.get(), tiles, d_weight.get());
      }
      put_gradients(first, n, d_weight.get(), d_bias.get());
    }
    if (io_.hidden == nullptr) return;
    // Sums over the threads that had labels, in thread order.
    partials_.get()[thread] = low < high ? d_hidden.get() : nullptr;
#pragma omp barrier
    Array<const float*> present(threads);
    int count = 0;
    for (int t = 0; t < threads; ++t) {
      if (partials_.get()[t] != nullptr) present.get()[count++] = partials_.get()[t];
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < rows_.panels; ++panel) put_hidden(panel, present.get(), count);
  }

 private:
  static void sum_rows(const float* d, int64_t n, float* d_bias) {
    for (int64_t label = 0; label < n; ++label) {
      V total = load(d_bias + label * W);
      for (int j = 0; j < NR; j += W) total += load(d + label * NR + j);
      store(d_bias + label * W, total);
    }
  }

  // to[channel][NR] += sum over labels of weight[label, channel] * d[label].
  void add_hidden(const BothWays& weight, int64_t n, const BothWays& d, const bool* active, float* to) const {
    constexpr int kDepth = Units<T>::kDepth;
    static_assert(MR % 2 == 0, "a tile of labels is a whole number of units");
    for (int64_t begin = 0; begin < n;) {
      if (!active[begin / MR]) {
        begin += MR;
        continue;
      }
      int64_t end = begin;
      while (end < n && active[end / MR]) end = std::min(end + MR, n);
      const int64_t unit = begin / kDepth, units = units_of<T>(end - begin);
      cover(op_.channels, [&](auto size, int64_t c) {
        V acc[decltype(size)::value][NV] = {};
        const ColumnUnits left = weight.column(c);
        accumulate<T>(acc, ColumnUnits{left.first + unit * left.stride, left.stride}, d.columns + unit * d.column_stride, units,
                      d.column_stride);
        put_tile(acc, true, to + c * NR, NR);
      });
      begin = end;
    }
  }

  // to[label][width] (+)= sum over the rows of `count` panels of d[label, row] * hidden[row].
  void add_weight(int64_t n, int64_t from, int64_t count, const BothWays* d, const bool* active, int64_t tiles, float* to) const {
    for (int64_t c = 0; c < rows_.width; c += NR) {
      cover(n, [&](auto size, int64_t label) {
        V acc[decltype(size)::value][NV] = {};
        for (int64_t p = 0; p < count; ++p) {
          if (!active[p * tiles + label / MR]) continue;
          accumulate<T>(acc, d[p].row(label), rows_.columns(from + p, c), rows_.row_units(from + p));
        }
        put_tile(acc, from > 0, to + label * rows_.width + c, rows_.width);
      });
    }
  }

  void put_gradients(int64_t first, int64_t n, const float* d_weight, const float* d_bias) const {
    const int64_t f = op_.channels;
    for (int64_t label = 0; label < n; ++label) {
      if (io_.bias != nullptr) {
        float* const to = io_.bias + first + label;
        *to = sum(load(d_bias + label * W)) + (io_.add ? *to : 0.0f);
      }
      if (!io_.weight.wanted()) continue;
      const float* from = rows_.panels == 0 ? nullptr : d_weight + label * rows_.width;
      put_row(io_.weight, io_.add, first + label, f, from);
    }
  }

  void put_hidden(int64_t panel, const float* const* arrays, int count) const {
    const int64_t f = op_.channels;
    for (int64_t row = panel * NR; row < (panel + 1) * NR; row += W) {
      for (int64_t c = 0; c < f; c += W) {
        const int64_t left = f - c;
        V v[W] = {};
        for (int k = 0; k < W && k < left; ++k) {
          for (int t = 0; t < count; ++t) v[k] += load(arrays[t] + (panel * f + c + k) * NR + row % NR);
        }
        transpose(v);
        for (int i = 0; i < W && row + i < op_.rows; ++i) store_part(io_.hidden + (row + i) * f + c, v[i], left);
      }
    }
  }

  const Head<E>& op_;
  const HeadRows<E>& rows_;
  const HeadGradients& io_;
  Array<const float*> partials_;
};

}  // namespace TERACON_ISA
}  // namespace teracon
