// Vectors and element types of one instruction set. Included inside the namespace of that instruction set, after
//   TERACON_LANES  floats in a vector
//   TERACON_NV     vectors across a register tile
//   TERACON_MR     rows of a register tile
//   TERACON_OR     rows of a register tile of an outer product
//   TERACON_DOT    defined where the instruction set multiplies pairs of bf16
// Without TERACON_DOT bf16 is a format of storage: products are of floats. Operands of matrix products are read as 32-bit units:
// one float, or two bf16 whose products are added.

constexpr int W = TERACON_LANES;
constexpr int NV = TERACON_NV;
constexpr int NR = W * NV;
constexpr int MR = TERACON_MR;
constexpr int OR = TERACON_OR;

// Values. The names beside them are the same where they lie in memory, at any address that their elements may have: an alignment
// that is part of V itself would be lost where compilers take references to it.
typedef float V __attribute__((vector_size(4 * TERACON_LANES), may_alias));
typedef float StoredV __attribute__((vector_size(4 * TERACON_LANES), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * TERACON_LANES), may_alias));
typedef uint32_t StoredU __attribute__((vector_size(4 * TERACON_LANES), aligned(2), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * TERACON_LANES), may_alias));
typedef uint16_t StoredH __attribute__((vector_size(2 * TERACON_LANES), aligned(2), may_alias));
typedef uint32_t Word;
typedef uint32_t AnyWord __attribute__((aligned(2), may_alias));  // wherever two bf16 lie

#define TERACON_INLINE inline __attribute__((always_inline))

// v - 0 is v for every v, v + 0 is not (-0): only this form compiles to a plain broadcast.
static TERACON_INLINE V splat(float v) { return v - V{}; }

static TERACON_INLINE V load(const float* p) { return *reinterpret_cast<const StoredV*>(p); }
static TERACON_INLINE void store(float* p, V v) { *reinterpret_cast<StoredV*>(p) = v; }

// Rounds to nearest, ties to even; a NaN stays one.
static TERACON_INLINE U upper_half(V v) {
  const U bits = reinterpret_cast<U&>(v);
  const U rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (v == v ? rounded : U{} + 0x7fc00000) & 0xffff0000;
}
static TERACON_INLINE H narrow(V v) {
#if defined(TERACON_DOT)
  return (H)_mm512_cvtneps_pbh((__m512)v);
#else
  return __builtin_convertvector(upper_half(v) >> 16, H);
#endif
}
static TERACON_INLINE V widen(H half) {
  U bits = __builtin_convertvector(half, U) << 16;
  return reinterpret_cast<V&>(bits);
}
static TERACON_INLINE V load(const Bf16* p) { return widen(*reinterpret_cast<const StoredH*>(p)); }
static TERACON_INLINE void store(Bf16* p, V v) { *reinterpret_cast<StoredH*>(p) = narrow(v); }

static inline float to_float(float v) { return v; }
static inline float to_float(Bf16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline void from_float(float v, float* to) { *to = v; }
static inline void from_float(float v, Bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  to->bits = v == v ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

// The first `left` of W elements; zeros behind them.
template <class E>
static TERACON_INLINE V load_part(const E* p, int64_t left) {
  if (left >= W) return load(p);
  float part[W] = {};
  for (int64_t i = 0; i < left; ++i) part[i] = to_float(p[i]);
  return load(part);
}
template <class E>
static TERACON_INLINE void store_part(E* p, V v, int64_t left) {
  if (left >= W) return store(p, v);
  float part[W];
  store(part, v);
  for (int64_t i = 0; i < left; ++i) from_float(part[i], p + i);
}
static TERACON_INLINE V keep_part(V v, int64_t left) {
  if (left >= W) return v;
  float part[W];
  store(part, v);
  return load_part(part, left);
}

static TERACON_INLINE float sum(V v) {
  float part[W];
  store(part, v);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// Element pairs of the lower and of the upper halves of two vectors, one from each in turn.
#if TERACON_LANES == 16
#define TERACON_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define TERACON_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif TERACON_LANES == 8
#define TERACON_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define TERACON_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define TERACON_LOWER 0, 4, 1, 5
#define TERACON_UPPER 2, 6, 3, 7
#endif
#if defined(__clang__)
#define TERACON_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TERACON_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, U{__VA_ARGS__})
#endif

// Rows become columns: interleaving the first half of the rows with the second, as often as W has factors of two.
static TERACON_INLINE void transpose(V (&v)[W]) {
#pragma GCC unroll 4
  for (int done = 1; done < W; done *= 2) {
    V next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = TERACON_SHUFFLE(v[i], v[i + W / 2], TERACON_LOWER);
      next[2 * i + 1] = TERACON_SHUFFLE(v[i], v[i + W / 2], TERACON_UPPER);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

// A NaN fails the comparison and comes through.
static TERACON_INLINE V relu(V a) { return a < V{} ? V{} : a; }

// What products are formed of when rows are stored as E, and the kDepth places of the summed axis that make one of its units.
template <class E>
struct Units;

template <>
struct Units<float> {
  static constexpr int kDepth = 1;
  typedef V Vec;
  static TERACON_INLINE V load(const Word* p) { return *reinterpret_cast<const StoredV*>(p); }
  static TERACON_INLINE V broadcast(const Word* p) {
    float value;
    std::memcpy(&value, p, 4);
    return splat(value);
  }
  static TERACON_INLINE V multiply_add(V sum, V a, V b) { return sum + a * b; }
  static TERACON_INLINE U join(const V* rows) { return reinterpret_cast<const U&>(rows[0]); }
};

#if defined(TERACON_DOT)
template <>
struct Units<Bf16> {
  static constexpr int kDepth = 2;
  typedef U Vec;
  static TERACON_INLINE U load(const Word* p) { return *reinterpret_cast<const StoredU*>(p); }
  static TERACON_INLINE U broadcast(const Word* p) { return *reinterpret_cast<const AnyWord*>(p) - U{}; }
  static TERACON_INLINE V multiply_add(V sum, U a, U b) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
  static TERACON_INLINE U join(const V* rows) { return (upper_half(rows[0]) >> 16) | upper_half(rows[1]); }
};
template <class E>
using Operand = E;
#else
template <class E>
using Operand = float;
#endif

// Memory on a cache-line boundary, not initialized unless asked for. Not std::vector: an instantiation of a standard template
// could be compiled for this instruction set and then shared by the linker with code that runs on every machine.
template <class T>
class Array {
 public:
  explicit Array(int64_t count, bool zeroed = false)
      : data_(static_cast<T*>(::operator new[](sizeof(T) * (count > 0 ? count : 1), std::align_val_t{64}))) {
    if (zeroed && count > 0) std::memset(static_cast<void*>(data_), 0, sizeof(T) * count);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { ::operator delete[](data_, std::align_val_t{64}); }
  T* get() const { return data_; }

 private:
  T* data_;
};

// Calls fn in every thread of a team. Work stands in a function of its own, since some compilers build the body of a parallel region
// for the machine that the file is built for, not for this instruction set.
template <class Fn>
static inline void in_parallel(int threads, const Fn& fn) {
#pragma omp parallel num_threads(threads)
  fn();
}

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
