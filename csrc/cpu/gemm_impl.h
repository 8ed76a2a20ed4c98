// Register tiles of one instruction set. Included inside its namespace, after vector_impl.h.

// Rows of the left operand by address: unit p of row i.
template <int R>
struct RowUnits {
  const Word* row[R];
  explicit TERACON_INLINE RowUnits(const Word* const* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) row[i] = rows[i];
  }
  TERACON_INLINE const Word* operator()(int i, int64_t p) const { return row[i] + p; }
};

// Columns of the left operand stored by unit: column i of unit p.
struct ColumnUnits {
  const Word* first;
  int64_t stride;
  TERACON_INLINE const Word* operator()(int i, int64_t p) const { return first + p * stride + i; }
};

// acc[i] += sum_p a(i, p) * b[p], where unit p of b is at b + p * step.
template <class T, int R, class Left>
static TERACON_INLINE void accumulate(V (&acc)[R][NV], const Left& a, const Word* b, int64_t units, int64_t step = NR) {
#pragma GCC unroll 2
  for (int64_t p = 0; p < units; ++p, b += step) {
    typename Units<T>::Vec row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = Units<T>::load(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const auto left = Units<T>::broadcast(a(i, p));
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Units<T>::multiply_add(acc[i][j], left, row[j]);
    }
  }
}

template <int R, class Fn>
static TERACON_INLINE void for_tile(V (&acc)[R][NV], Fn fn) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) fn(acc[i][j], i, j * W);
  }
}

// c[i] = sum over `segments` of rows a[s * stride + i] times the matrix b + s * units * NR.
template <class T, int R>
static void direct_tile(const Word* const* a, int64_t stride, int64_t segments, const Word* b, int64_t units, float* c,
                        int64_t ldc) {
  V acc[R][NV] = {};
  for (int64_t s = 0; s < segments; ++s) accumulate<T>(acc, RowUnits<R>(a + s * stride), b + s * units * NR, units);
  for_tile<R>(acc, [&](V& v, int i, int j) { store(c + i * ldc + j, v); });
}

// Minimal filtering F(2,3) (Lavin & Gray 2015, arXiv 1509.09308): both outputs of R pairs from four matrix products.
// Filtered rows a[s * stride + i] and matrices follow the order of the planes (weights_impl.h).
template <class T, int R>
static void filtered_tile(const Word* const* a, int64_t stride, const Word* b, int64_t units, float* first, float* second,
                          int64_t ldc) {
  V acc[R][NV] = {};
  const int64_t matrix = units * NR;
  accumulate<T>(acc, RowUnits<R>(a), b, units);
  for_tile<R>(acc, [&](V& v, int i, int j) { store(second + i * ldc + j, v), v = V{}; });
  accumulate<T>(acc, RowUnits<R>(a + stride), b + matrix, units);
  for_tile<R>(acc, [&](V& v, int i, int j) {
    const V middle = load(second + i * ldc + j);
    store(second + i * ldc + j, middle - v);
    v = middle + v;
  });
  accumulate<T>(acc, RowUnits<R>(a + 2 * stride), b + 2 * matrix, units);
  for_tile<R>(acc, [&](V& v, int i, int j) {
    store(first + i * ldc + j, v);
    v = load(second + i * ldc + j);
  });
  accumulate<T>(acc, RowUnits<R>(a + 3 * stride), b + 3 * matrix, units);
  for_tile<R>(acc, [&](V& v, int i, int j) { store(second + i * ldc + j, v); });
}

// fn(tile size, first row) for tiles that cover n rows: as few as MR allows, of nearly equal even sizes. The last one reaches a row
// further where n is odd.
template <int R = MR, class Fn>
static inline void with_size(int64_t rows, int64_t from, const Fn& fn) {
  if constexpr (R > 2) {
    if (rows <= R - 2) return with_size<R - 2>(rows, from, fn);
  }
  fn(std::integral_constant<int, R>{}, from);
}
template <class Fn>
static inline void cover_rows(int64_t n, const Fn& fn) {
  const int64_t tiles = (n + MR - 1) / MR, size = tiles == 0 ? MR : round_up((n + tiles - 1) / tiles, 2);
  for (int64_t from = 0; from < n; from += size) with_size(std::min(size, n - from), from, fn);
}

// What an outer product sums over: units of rows, side by side. Rows are `left_stride` and `right_stride` apart.
struct Depth {
  int64_t units, left_stride, right_stride;
};

// c += a^T b, one tile of OR x NR.
template <class T>
static void outer_tile(const Word* a, const Word* b, const Depth& depth, float* c, int64_t ldc) {
  V acc[OR][NV];
  for_tile<OR>(acc, [&](V& v, int i, int j) { v = load(c + i * ldc + j); });
  accumulate<T>(acc, ColumnUnits{a, depth.left_stride}, b, depth.units, depth.right_stride);
  for_tile<OR>(acc, [&](V& v, int i, int j) { store(c + i * ldc + j, v); });
}

// The transpose of F(2,3), also called F(3,2): what pairs add to the three matrices c, c + matrix, c + 2 * matrix, from four
// products. `scratch` holds a tile. Plane s of the operands is at a + s * a_plane and b + s * b_plane.
template <class T>
static void filtered_outer_tile(const Word* a, int64_t a_plane, const Word* b, int64_t b_plane, const Depth& depth, float* c,
                                int64_t ldc, int64_t matrix, float* scratch) {
  V acc[OR][NV] = {};
  const auto add_plane = [&](int64_t plane) {
    accumulate<T>(acc, ColumnUnits{a + plane * a_plane, depth.left_stride}, b + plane * b_plane, depth.units, depth.right_stride);
  };
  add_plane(0);
  for_tile<OR>(acc, [&](V& v, int i, int j) { store(scratch + i * NR + j, v), v = V{}; });
  add_plane(1);
  for_tile<OR>(acc, [&](V& v, int i, int j) {
    const V other = load(scratch + i * NR + j), half = (other + v) * 0.5f;
    float* const at = c + i * ldc + j;
    store(at + matrix, load(at + matrix) + (other - v) * 0.5f);
    store(scratch + i * NR + j, half);
    v = load(at) + half;
  });
  add_plane(2);
  for_tile<OR>(acc, [&](V& v, int i, int j) {
    float* const at = c + i * ldc + j;
    store(at, v);
    v = load(at + 2 * matrix) + load(scratch + i * NR + j);
  });
  add_plane(3);
  for_tile<OR>(acc, [&](V& v, int i, int j) { store(c + 2 * matrix + i * ldc + j, v); });
}
