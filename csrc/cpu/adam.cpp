#include "adam.h"

#include <algorithm>
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
  // Once each: whoever comes second finds the row where it should be.
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
