// The fp32 FMA peak: the rate that no kernel on this machine can pass, measured rather than read from a data sheet.
//
// Each thread runs independent chains x = x * a + b that live in registers. The chains must cover latency times
// issue width (4 x 2 on every AVX2 and AVX-512 core to date, 5 x 2 on the older ones): 12 do, and leave room for a and b
// among 16 registers.

#include "fma_peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define TERACON_X86 1
#include <immintrin.h>
#endif

namespace teracon {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kChains = 12;
constexpr int kRounds = 8;
constexpr double kRoundSeconds = 0.02;

// Values that stay normal: x tends to b / (1 - a) = 1. Volatile, so that the compiler cannot compute the result itself.
volatile float g_a = 0.999f;
volatile float g_b = 0.001f;
volatile float g_sink = 0.0f;

struct Kernel {
  void (*run)(int64_t iterations);
  int64_t flops_per_iteration;
  const char* name;
};

#ifdef TERACON_X86
__attribute__((target("avx512f"))) void run_avx512(int64_t iterations) {
  const __m512 a = _mm512_set1_ps(g_a), b = _mm512_set1_ps(g_b);
  __m512 x[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) x[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = _mm512_fmadd_ps(x[i], a, b);
  }
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) x[0] = _mm512_add_ps(x[0], x[i]);
  g_sink = _mm512_cvtss_f32(x[0]);
}

__attribute__((target("avx2,fma"))) void run_avx2(int64_t iterations) {
  const __m256 a = _mm256_set1_ps(g_a), b = _mm256_set1_ps(g_b);
  __m256 x[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) x[i] = _mm256_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = _mm256_fmadd_ps(x[i], a, b);
  }
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) x[0] = _mm256_add_ps(x[0], x[i]);
  g_sink = _mm256_cvtss_f32(x[0]);
}
#endif

// 128-bit vectors, which every 64-bit processor has: a fused multiply-add where it has one (Arm), else two operations.
using Vec4 = float __attribute__((vector_size(16)));

void run_generic(int64_t iterations) {
  const float a = g_a, b = g_b;
  const Vec4 va = {a, a, a, a}, vb = {b, b, b, b};
  Vec4 x[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) x[i] = vb * static_cast<float>(i);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = x[i] * va + vb;
  }
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) x[0] += x[i];
  g_sink = x[0][0];
}

constexpr int64_t flops(int lanes) { return int64_t{2} * lanes * kChains; }

Kernel choose() {
#ifdef TERACON_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return {run_avx512, flops(16), "avx512f"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {run_avx2, flops(8), "avx2+fma"};
#endif
  return {run_generic, flops(4), "generic"};
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// All threads start together; the slowest one's time counts.
double round_seconds(const Kernel& kernel, int threads, int64_t iterations) {
  std::atomic<int> waiting{threads};
  std::vector<double> seconds(threads);
  auto work = [&](int thread) {
    waiting.fetch_sub(1);
    while (waiting.load() > 0) std::this_thread::yield();
    const auto start = Clock::now();
    kernel.run(iterations);
    seconds[thread] = seconds_since(start);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
  return *std::max_element(seconds.begin(), seconds.end());
}

}  // namespace

const char* fma_instructions() { return choose().name; }

double fma_peak(int threads) {
  const Kernel kernel = choose();
  int64_t iterations = 1 << 16;
  // Long enough to pass the clock's ramp and the start of the threads.
  while (round_seconds(kernel, 1, iterations) < kRoundSeconds) iterations *= 2;
  double best = 0.0;
  for (int round = 0; round < kRounds; ++round) {
    const double operations = static_cast<double>(kernel.flops_per_iteration) * iterations * threads;
    best = std::max(best, operations / round_seconds(kernel, threads, iterations) * 1e-9);
  }
  return best;
}

}  // namespace teracon
