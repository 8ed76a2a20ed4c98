// Adam for one instruction set, with the roundings of torch's fused kernel. Included by isa_*.cpp after vector_impl.h.
//
// Which products are rounded before they are added is part of the result. So every fused multiply-add is written as one, and
// no other product has a sum beside it that a compiler could fuse it with.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

// a * b + c. Torch's kernel for x86 processors without fused multiply-add rounds the product, and so does the generic one here.
static TERACON_INLINE V adam_fma(V a, V b, V c) {
#if TERACON_LANES == 16
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif TERACON_LANES == 8
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__x86_64__) && !defined(__FMA__)
  return a * b + c;
#else
  V v;
  for (int i = 0; i < W; ++i) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return v;
#endif
}

#if TERACON_LANES == 4 && defined(__x86_64__) && !defined(__FMA__)
constexpr bool kAdamFused = false;
#else
constexpr bool kAdamFused = true;
#endif

static TERACON_INLINE V adam_sqrt(V a) {
#if TERACON_LANES == 16
  return (V)_mm512_maskz_sqrt_ps(0xffff, (__m512)a);  // the plain one draws a warning of gcc 12
#elif TERACON_LANES == 8
  return (V)_mm256_sqrt_ps((__m256)a);
#elif defined(__x86_64__)
  return (V)_mm_sqrt_ps((__m128)a);
#else
  V v;
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(a[i]);
  return v;
#endif
}

// Whether all elements are equal; a NaN equals nothing.
static TERACON_INLINE bool adam_equal(V a, V b) {
#if TERACON_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ) == 0;
#elif TERACON_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NEQ_UQ)) == 0;
#else
  int other = 0;
  for (int i = 0; i < W; ++i) other |= !(a[i] == b[i]);
  return other == 0;
#endif
}

// AdamNumbers, one vector each. Moments are formed as torch.lerp does: from the end that is nearer.
struct AdamVectors {
  V coefficient, beta2, rest2, eps;
  bool near_old, positive_eps;
  explicit TERACON_INLINE AdamVectors(const AdamNumbers& n)
      : coefficient(splat(n.rest1 < 0.5f ? n.rest1 : n.rest1 - 1.0f)), beta2(splat(n.beta2)), rest2(splat(n.rest2)),
        eps(splat(n.eps)), near_old(n.rest1 < 0.5f), positive_eps(n.eps > 0) {}
};

static TERACON_INLINE V adam_moved(const AdamVectors& n, const AdamStep& step, V parameter, V first, V second) {
  return parameter + (splat(step.minus_step_size) * first) / (adam_sqrt(second) / splat(step.root) + n.eps);
}

// The same for a finite second moment and a step that has `low`: two products take less time than a division.
static TERACON_INLINE V adam_moved_by_products(const AdamVectors& n, const AdamStep& step, V parameter, V first, V second) {
  const V root = adam_sqrt(second);
  const V scaled = adam_fma(root, splat(step.high), root * splat(step.low));
  return parameter + (splat(step.minus_step_size) * first) / (scaled + n.eps);
}

static TERACON_INLINE void adam_vector(const AdamVectors& n, const AdamStep& step, float* parameter, float* first, float* second,
                                       const float* gradient, int64_t left, bool single) {
  const V g = load_part(gradient, left), old = load_part(first, left);
  const V m = adam_fma(n.coefficient, g - old, n.near_old ? old : g);
  V v = load_part(second, left);
  const V scaled = n.rest2 * g;
  v = single ? adam_fma(v, n.beta2, scaled * g) : adam_fma(scaled, g, v * n.beta2);
  store_part(first, m, left);
  store_part(second, v, left);
  store_part(parameter, adam_moved(n, step, load_part(parameter, left), m, v), left);
}

static void adam_with_gradient(const AdamNumbers& numbers, const AdamStep& step, float* parameter, float* first, float* second,
                               const float* gradient, int64_t count, int64_t tail) {
  const AdamVectors n(numbers);
  const int64_t whole = count - tail;
  for (int64_t i = 0; i < whole; i += W) {
    adam_vector(n, step, parameter + i, first + i, second + i, gradient + i, whole - i, false);
  }
  for (int64_t i = whole; i < count; i += W) {
    adam_vector(n, step, parameter + i, first + i, second + i, gradient + i, count - i, true);
  }
}

// Decay of the moments alone, `steps` times. Products of one vector wait for each other, so several vectors take turns.
template <int N>
static TERACON_INLINE void adam_decay(const AdamVectors& n, int64_t steps, V (&m)[N], V (&v)[N]) {
  constexpr int64_t kLook = 32;  // steps between looks at what has become zero
  const auto gone = [](const V(&values)[N]) {
    bool zero = true;
    for (int j = 0; j < N; ++j) zero &= adam_equal(values[j], V{});
    return zero;
  };
  while (steps > 0) {
    const int64_t now = std::min(steps, kLook);
    steps -= now;
    if (gone(m)) {
      if (gone(v)) return;
      for (int64_t t = 0; t < now; ++t) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) v[j] *= n.beta2;
      }
      continue;
    }
    for (int64_t t = 0; t < now; ++t) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        m[j] = adam_fma(n.coefficient, -m[j], n.near_old ? m[j] : V{});
        v[j] *= n.beta2;
      }
    }
  }
}

// Steps of one vector, until an update has changed nothing: those behind it, which are no larger, cannot either, since moments
// keep their signs and adding is monotonic. Returns how many steps were taken.
static TERACON_INLINE int64_t adam_move(const AdamVectors& n, const AdamStep* steps, int64_t num_steps, V* parameter, V* first,
                                        V* second) {
  V p = *parameter, m = *first, v = *second;
  int64_t t = 0;
  bool moves = true;
  const bool finite = kAdamFused && adam_equal(v - v, V{});
  while (t < num_steps && moves) {
    m = adam_fma(n.coefficient, -m, n.near_old ? m : V{});
    v *= n.beta2;
    const bool products = finite && steps[t].low == steps[t].low;
    const V next = products ? adam_moved_by_products(n, steps[t], p, m, v) : adam_moved(n, steps[t], p, m, v);
    moves = !adam_equal(next, p);
    p = next;
    ++t;
  }
  *parameter = p, *first = m, *second = v;
  return t;
}

template <int N>
static TERACON_INLINE void adam_missed(const AdamVectors& n, const AdamStep* steps, int64_t num_steps, float* parameter,
                                       float* first, float* second, int64_t left) {
  V p[N], m[N], v[N];
  bool zero = n.positive_eps;  // else 0 / 0 is a result too
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    m[j] = load_part(first + j * W, left - j * W), v[j] = load_part(second + j * W, left - j * W);
    zero = zero && adam_equal(m[j], V{}) && adam_equal(v[j], V{});
  }
  if (zero) return;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) p[j] = load_part(parameter + j * W, left - j * W);
  int64_t stopped[N], latest = 0;
  for (int j = 0; j < N; ++j) {
    stopped[j] = adam_move(n, steps, num_steps, &p[j], &m[j], &v[j]);
    latest = std::max(latest, stopped[j]);
  }
  for (int j = 0; j < N; ++j) {
    V one_m[1] = {m[j]}, one_v[1] = {v[j]};
    adam_decay(n, latest - stopped[j], one_m, one_v);
    m[j] = one_m[0], v[j] = one_v[0];
  }
  adam_decay(n, num_steps - latest, m, v);
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    store_part(parameter + j * W, p[j], left - j * W);
    store_part(first + j * W, m[j], left - j * W), store_part(second + j * W, v[j], left - j * W);
  }
}

static void adam_without_gradient(const AdamNumbers& numbers, const AdamStep* steps, int64_t num_steps, float* parameter,
                                  float* first, float* second, int64_t count) {
  const AdamVectors n(numbers);
  constexpr int kTogether = 4;
  int64_t i = 0;
  for (; i + kTogether * W <= count; i += kTogether * W) {
    adam_missed<kTogether>(n, steps, num_steps, parameter + i, first + i, second + i, kTogether * W);
  }
  for (; i < count; i += W) adam_missed<1>(n, steps, num_steps, parameter + i, first + i, second + i, count - i);
}

}  // namespace TERACON_ISA
}  // namespace teracon
