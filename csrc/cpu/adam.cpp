#include "adam.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace teracon {
namespace {

// Moments of rows that are not seen for long decay into the range below 1.2e-38, where each operation of these processors takes
// some hundred cycles; rounding keeps them there for ever. This thread takes such numbers for zero while one of these lives.
class TinyIsZero {
 public:
  explicit TinyIsZero(bool wanted) {
#if defined(__x86_64__)
    constexpr unsigned kResultsAndOperands = 0x8040;
    before_ = _mm_getcsr();
    if (wanted) _mm_setcsr(before_ | kResultsAndOperands);
#else
    static_cast<void>(wanted);
#endif
  }
  TinyIsZero(const TinyIsZero&) = delete;
  TinyIsZero& operator=(const TinyIsZero&) = delete;
  ~TinyIsZero() {
#if defined(__x86_64__)
    _mm_setcsr(before_);
#endif
  }

 private:
#if defined(__x86_64__)
  unsigned before_;
#endif
};

// The float nearest x / y without a division (Brisebarre, Muller & Raina 2004, doi 10.1109/TC.2004.37), for a positive y.
// Before its last rounding the sum is within 2^-47 of the quotient, relatively, so it can be rounded otherwise only where the
// quotient is as near to the middle of two floats. Let X, Y be the significands, 24 bits each, and N / 2 that middle: then
// X * 2^k = N * Y + r with |r| <= 4, N odd of 25 bits, and k = 24 or, where X < Y, 25. That leaves a handful of X to try.
bool divides_by_products(float y, float high, float low) {
  int exponent;
  const float significand = std::ldexp(std::frexp(y, &exponent), 24);
  const float scaled_high = std::ldexp(high, exponent - 24), scaled_low = std::ldexp(low, exponent - 24);
  const uint64_t divisor = static_cast<uint64_t>(significand);
  int zeros = 0;
  while (((divisor >> zeros) & 1) == 0) ++zeros;
  uint64_t inverse = 1;  // of the odd part, modulo 2^64
  for (int i = 0; i < 6; ++i) inverse *= 2 - (divisor >> zeros) * inverse;
  for (int k = 24; k <= 25; ++k) {
    for (int64_t r = -8; r <= 8; ++r) {
      if (r == 0 || r % (int64_t{1} << zeros) != 0) continue;
      if (zeros > k) continue;
      const uint64_t period = uint64_t{1} << (k - zeros);
      const uint64_t first = (static_cast<uint64_t>(-(r / (int64_t{1} << zeros))) * inverse) & (period - 1);
      for (uint64_t n = first; n < (uint64_t{1} << 25); n += period) {
        if (n < (uint64_t{1} << 24) || n % 2 == 0) continue;
        const uint64_t dividend = (n * divisor + static_cast<uint64_t>(r)) >> k;
        if (dividend < (uint64_t{1} << 23) || dividend >= (uint64_t{1} << 24)) continue;
        const float x = static_cast<float>(dividend);
        if (std::fmaf(x, scaled_high, x * scaled_low) != x / significand) return false;
      }
    }
  }
  return true;
}

constexpr int64_t kRowsAtOnce = 64;
// From this eps on, moments below 1.2e-38 are lost in the rounding of what they are added to.
constexpr float kEpsAboveTiny = 1e-10f;

// A row and the steps that it has taken.
struct Behind {
  int64_t row;
  int32_t last;
};

// The steps from..to-1 of a row, in stretches within which updates only shrink.
void replay(const AdamKernels& kernels, const AdamArrays& arrays, const AdamNumbers& numbers, const AdamHistory& history,
            int64_t row, int64_t from, int64_t to) {
  const int64_t at = row * arrays.channels;
  const int64_t* const last = history.growing + history.num_growing;
  while (from < to) {
    const int64_t* const next = std::upper_bound(history.growing, last, from);
    const int64_t end = next == last ? to : std::min(to, std::max(*next, from + 1));
    kernels.without_gradient(numbers, history.steps + from, end - from, arrays.parameter + at, arrays.first + at,
                             arrays.second + at, arrays.channels);
    from = end;
  }
}

// Its next use is some microseconds away.
void prefetch(const AdamArrays& arrays, int64_t row) {
  const int64_t at = row * arrays.channels;
  for (const float* array : {arrays.parameter + at, arrays.first + at, arrays.second + at}) {
    for (int64_t i = 0; i < arrays.channels; i += 16) __builtin_prefetch(array + i, 1);
  }
}

int64_t tail_of_row(const AdamArrays& arrays, const AdamGradient& gradient, int64_t row) {
  const int64_t behind = (arrays.rows - 1 - row) * arrays.channels;  // elements of later rows
  return std::clamp<int64_t>(gradient.tail - behind, 0, arrays.channels);
}

}  // namespace

AdamStep adam_step(double step_size, double root) {
  AdamStep step{static_cast<float>(-step_size), static_cast<float>(root), 0.0f, std::numeric_limits<float>::quiet_NaN()};
  const bool ordinary = step.root > 1e-6f && step.root <= 1.0f;  // nothing overflows or is lost in rounding to zero
  if (!ordinary) return step;
  const double inverse = 1.0 / static_cast<double>(step.root);
  step.high = static_cast<float>(inverse);
  const float low = static_cast<float>(inverse - static_cast<double>(step.high));
  if (divides_by_products(step.root, step.high, low)) step.low = low;
  return step;
}

void adam(const AdamArrays& arrays, const AdamGradient& gradient, const AdamNumbers& numbers, const AdamStep& step, int threads) {
  const AdamKernels& kernels = adam_kernels();
  const int64_t blocks = (arrays.rows + kRowsAtOnce - 1) / kRowsAtOnce, f = arrays.channels;
#pragma omp parallel num_threads(threads)
  {
    const TinyIsZero mode(numbers.eps >= kEpsAboveTiny);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t row = block * kRowsAtOnce;
      const int64_t end = std::min(row + kRowsAtOnce, arrays.rows);
      int64_t i = std::lower_bound(gradient.rows, gradient.rows + gradient.count, row) - gradient.rows;
      while (row < end) {
        const int64_t next = i < gradient.count ? std::min(gradient.rows[i], end) : end;
        kernels.without_gradient(numbers, &step, 1, arrays.parameter + row * f, arrays.first + row * f, arrays.second + row * f,
                                 (next - row) * f);
        row = next;
        if (row < end) {
          kernels.with_gradient(numbers, step, arrays.parameter + row * f, arrays.first + row * f, arrays.second + row * f,
                                gradient.values + i * f, f, tail_of_row(arrays, gradient, row));
          ++row, ++i;
        }
      }
    }
  }
}

int64_t adam_catch_up(const AdamArrays& arrays, int32_t* last, const int64_t* items, int64_t count, const AdamNumbers& numbers,
                      const AdamHistory& history, int64_t to, int threads) {
  const AdamKernels& kernels = adam_kernels();
  const int64_t number = items == nullptr ? arrays.rows : count;
  std::vector<Behind> behind;
  for (int64_t i = 0; i < number; ++i) {
    const int64_t row = items == nullptr ? i : items[i];
    if (row < 0 || row >= arrays.rows) continue;
    if (last[row] < -1 || last[row] > to) return -1;
    if (last[row] >= 0 && last[row] < to) behind.push_back({row, last[row]});
  }
  // A repeated row is up to date when it comes again.
  int64_t kept = 0;
  for (const Behind& found : behind) {
    if (last[found.row] == to) continue;
    last[found.row] = static_cast<int32_t>(to);
    behind[kept++] = found;
  }
#pragma omp parallel num_threads(threads)
  {
    const TinyIsZero mode(true);
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < kept; ++i) {
      if (i + 1 < kept) prefetch(arrays, behind[i + 1].row);
      replay(kernels, arrays, numbers, history, behind[i].row, behind[i].last, to);
    }
  }
  return kept;
}

bool adam_deferred(const AdamArrays& arrays, int32_t* last, const AdamGradient& gradient, const AdamNumbers& numbers,
                   const AdamHistory& history, int64_t to, int threads) {
  const AdamKernels& kernels = adam_kernels();
  const int64_t f = arrays.channels;
  for (int64_t i = 0; i < gradient.count; ++i) {
    if (last[gradient.rows[i]] < -1 || last[gradient.rows[i]] >= to) return false;
  }
#pragma omp parallel num_threads(threads)
  {
    const TinyIsZero mode(true);
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < gradient.count; ++i) {
      if (i + 1 < gradient.count) prefetch(arrays, gradient.rows[i + 1]);
      const int64_t row = gradient.rows[i];
      if (last[row] >= 0) replay(kernels, arrays, numbers, history, row, last[row], to - 1);
      kernels.with_gradient(numbers, history.steps[to - 1], arrays.parameter + row * f, arrays.first + row * f,
                            arrays.second + row * f, gradient.values + i * f, f, tail_of_row(arrays, gradient, row));
      last[row] = static_cast<int32_t>(to);
    }
  }
  return true;
}

}  // namespace teracon
