// The gather GEMM on blocks of rows. Included inside the namespace of one instruction set.

// Rows whose outputs, with their filtered inputs, stay in the second-level cache together.
static_assert(MR % 2 == 0, "tiles that reach a row too far stay within a block");
constexpr int64_t kBlock = 4 * MR;
constexpr int64_t kPairBlock = 2 * MR;

// One thread's room for a block of rows stored as E.
template <class E>
struct BlockBuffers {
  typedef Operand<E> T;
  explicit BlockBuffers(const Panels<T>& weights)
      : sums(kBlock * weights.ldc),
        staged(std::max(kPlanes * kPairBlock, weights.kernel_size * kBlock) * weights.units),
        rows(std::max(kPlanes * kPairBlock, weights.kernel_size * kBlock)) {}
  // Room for operand row i, whose address is noted in rows.
  T* stage(int64_t i, int64_t units) {
    Word* to = staged.get() + i * units;
    rows.get()[i] = to;
    return reinterpret_cast<T*>(to);
  }
  // Gives a tile that reaches a row too far something to read.
  void repeat_row(int64_t i) { rows.get()[i] = rows.get()[i - 1]; }
  Array<float> sums;
  Array<Word> staged;
  Array<const Word*> rows;
};

// Rows of E by number, `width` elements each: numbers from `split` on name rows of `more`, -1 is a row of zeros.
template <class E>
struct RowSource {
  const E* rows;
  int64_t width, stride;
  const E* zeros;
  int64_t split = INT64_MAX;
  const E* more = nullptr;
  TERACON_INLINE const E* operator()(int64_t row) const {
    return row < 0 ? zeros : row < split ? rows + row * stride : more + (row - split) * stride;
  }
};

// sums[i] = sum_k source(at(i, k)) @ W_k for n rows, at most kBlock.
template <class E, class At>
static void convolve_rows(const Panels<Operand<E>>& weights, const RowSource<E>& source, int64_t n, const At& at,
                          BlockBuffers<E>* buffers) {
  typedef Operand<E> T;
  const int64_t padded = weights.units * Units<T>::kDepth;
  // Rows that are operands as they are stored are read in place.
  const bool in_place = std::is_same<T, E>::value && padded == source.width;
  for (int64_t k = 0; k < weights.kernel_size; ++k) {
    for (int64_t i = 0; i < n; ++i) {
      const E* from = source(at(i, k));
      if (in_place) {
        buffers->rows.get()[k * kBlock + i] = reinterpret_cast<const Word*>(from);
        continue;
      }
      T* to = buffers->stage(k * kBlock + i, weights.units);
      for (int64_t c = 0; c < padded; c += W) store_part(to + c, load_part(from + c, source.width - c), padded - c);
    }
  }
  for (int64_t k = 0; n % 2 && k < weights.kernel_size; ++k) buffers->repeat_row(k * kBlock + n);
  for (int64_t first = 0; first < weights.ldc; first += NR) {
    const Word* matrices = weights.direct + first * weights.units * weights.kernel_size;
    cover_rows(n, [&](auto size, int64_t row) {
      direct_tile<T, decltype(size)::value>(buffers->rows.get() + row, kBlock, weights.kernel_size, matrices, weights.units,
                                            buffers->sums.get() + row * weights.ldc + first, weights.ldc);
    });
  }
}

// The same for n pairs, at most kPairBlock: outputs of pair i are sums[i] and sums[kPairBlock + i], its inputs x_q, q = 0..3, are
// source(at(i, q)).
template <class E, class At>
static void convolve_pairs(const Panels<Operand<E>>& weights, const RowSource<E>& source, int64_t n, const At& at,
                           BlockBuffers<E>* buffers) {
  typedef Operand<E> T;
  const int64_t units = weights.units, ldc = weights.ldc, padded = units * Units<T>::kDepth;
  for (int64_t i = 0; i < n; ++i) {
    T* plane[kPlanes];
    for (int p = 0; p < kPlanes; ++p) plane[p] = buffers->stage(p * kPairBlock + i, units);
    const E *x0 = source(at(i, 0)), *x1 = source(at(i, 1)), *x2 = source(at(i, 2)), *x3 = source(at(i, 3));
    const E* next[4];
    for (int q = 0; q < 4; ++q) next[q] = source(at(std::min(i + 2, n - 1), q));
    for (int64_t c = 0; c < padded; c += W) {
      for (int q = 0; q < 4; ++q) __builtin_prefetch(next[q] + c);
      const int64_t left = source.width - c, room = padded - c;
      const V v0 = load_part(x0 + c, left), v1 = load_part(x1 + c, left), v2 = load_part(x2 + c, left);
      const V v3 = load_part(x3 + c, left);
      store_part(plane[kSum] + c, v1 + v2, room);
      store_part(plane[kDifference] + c, v2 - v1, room);
      store_part(plane[kFirst] + c, v0 - v2, room);
      store_part(plane[kSecond] + c, v3 - v1, room);
    }
  }
  for (int64_t p = 0; n % 2 && p < kPlanes; ++p) buffers->repeat_row(p * kPairBlock + n);
  for (int64_t first = 0; first < ldc; first += NR) {
    const Word* matrices = weights.filtered + first * units * kPlanes;
    cover_rows(n, [&](auto size, int64_t row) {
      float* to = buffers->sums.get() + row * ldc + first;
      filtered_tile<T, decltype(size)::value>(buffers->rows.get() + row, kPairBlock, matrices, units, to,
                                              to + kPairBlock * ldc, ldc);
    });
  }
}

// Which rows go through which products, and in what blocks.
struct RowPlan {
  const int32_t* table;  // [rows, kernel_size]
  int64_t kernel_size;
  PairedRows split;

  int64_t pair_blocks() const { return (split.pair_count + kPairBlock - 1) / kPairBlock; }
  int64_t blocks() const { return pair_blocks() + (split.single_count + kBlock - 1) / kBlock; }
  // Row of the source that input q (0..3) of pair i is.
  TERACON_INLINE int64_t input(int64_t i, int q) const {
    return q < 3 ? table[3 * split.pairs[2 * i] + q] : table[3 * split.pairs[2 * i + 1] + 2];
  }
};

// Runs one block of the plan and hands every row's sums to emit(row, sums [ldc]).
template <class E, class Emit>
static void run_block(const RowPlan& plan, int64_t block, const Panels<Operand<E>>& weights,
                      const RowSource<E>& source, BlockBuffers<E>* buffers, const Emit& emit) {
  float* sums = buffers->sums.get();
  const int64_t ldc = weights.ldc;
  if (block < plan.pair_blocks()) {
    const int64_t begin = block * kPairBlock, n = std::min(kPairBlock, plan.split.pair_count - begin);
    convolve_pairs(weights, source, n, [&](int64_t i, int q) { return plan.input(begin + i, q); }, buffers);
    for (int64_t i = 0; i < n; ++i) {
      emit(plan.split.pairs[2 * (begin + i)], sums + i * ldc);
      emit(plan.split.pairs[2 * (begin + i) + 1], sums + (kPairBlock + i) * ldc);
    }
  } else {
    const int64_t begin = (block - plan.pair_blocks()) * kBlock, n = std::min(kBlock, plan.split.single_count - begin);
    const int32_t* rows = plan.split.singles + begin;
    const auto at = [&](int64_t i, int64_t k) { return plan.table[rows[i] * plan.kernel_size + k]; };
    convolve_rows(weights, source, n, at, buffers);
    for (int64_t i = 0; i < n; ++i) emit(rows[i], sums + i * ldc);
  }
}
