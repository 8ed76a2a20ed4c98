#include "adam.h"

#include <algorithm>

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

}  // namespace

void adam(const AdamRows& op, const AdamNumbers& numbers, int threads) {
  const AdamKernels& kernels = adam_kernels();
  const int64_t blocks = (op.rows + kRowsAtOnce - 1) / kRowsAtOnce, f = op.channels;
#pragma omp parallel num_threads(threads)
  {
    const TinyIsZero mode(numbers.eps >= kEpsAboveTiny);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t row = block * kRowsAtOnce;
      const int64_t end = std::min(row + kRowsAtOnce, op.rows);
      int64_t i = std::lower_bound(op.with, op.with + op.count, row) - op.with;
      while (row < end) {
        const int64_t next = i < op.count ? std::min(op.with[i], end) : end;
        // With eps = 0 a parameter without moments becomes NaN, as 0 / 0 is.
        kernels.without_gradient(numbers, op.parameter + row * f, op.first + row * f, op.second + row * f, next - row, f,
                                 numbers.eps > 0);
        row = next;
        if (row < end) {
          kernels.with_gradient(numbers, op.parameter + row * f, op.first + row * f, op.second + row * f,
                                op.gradient + i * f, f);
          ++row, ++i;
        }
      }
    }
  }
}

}  // namespace teracon
