// The masked convolution for one instruction set. Included by isa_*.cpp, which define
//   TERACON_ISA    name of the namespace
//   TERACON_LANES  floats in a vector
//   TERACON_NV     vectors across a register tile; a tile is 6 rows x TERACON_NV vectors
// Every thread owns a fixed range of rows and sums across threads run in thread order, so results depend on the number of
// threads only, never on timing.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "masked_conv.h"

namespace teracon {
namespace TERACON_ISA {

constexpr int W = TERACON_LANES;
constexpr int NV = TERACON_NV;
constexpr int NR = W * NV;
constexpr int MR = 6;
// Rows whose inputs, outputs and register-tile operands stay in the second-level cache together.
constexpr int64_t kBlock = 48;
constexpr int64_t kBackwardBlock = 96;

typedef float V __attribute__((vector_size(4 * TERACON_LANES), aligned(4)));

static inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
static inline void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
// v - 0 is v for every v, v + 0 is not (-0): only this form compiles to a plain broadcast.
static inline V splat(float v) { return v - V{}; }

// Zeroed memory on a cache-line boundary. Not std::vector: an instantiation of a standard template could be compiled for
// this instruction set and then shared by the linker with code that runs on every machine.
template <class T>
class Array {
 public:
  explicit Array(int64_t count) : data_(new (std::align_val_t{64}) T[count > 0 ? count : 1]()) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { ::operator delete[](data_, std::align_val_t{64}); }
  T* get() { return data_; }

 private:
  T* data_;
};
using Buffer = Array<float>;

static inline int64_t padded(int64_t f) { return (f + NR - 1) / NR * NR; }

// The range of `count` rows that a thread owns: whole register tiles, nearly equal shares.
static inline void share(int64_t count, int threads, int thread, int64_t* low, int64_t* high) {
  const int64_t tiles = (count + MR - 1) / MR;
  *low = std::min(count, tiles * thread / threads * MR);
  *high = std::min(count, tiles * (thread + 1) / threads * MR);
}

// c[i] (+)= sum_p a[i][p] * b[p], for R rows and one tile of columns.
template <int R>
static inline void tile(const float* const* a, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
  V acc[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = add ? load(c + i * ldc + j * W) : V{};
  }
  const float* row[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) row[i] = a[i];
#pragma GCC unroll 2
  for (int64_t p = 0; p < depth; ++p, b += NR) {
    V bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V av = splat(row[i][p]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * W, acc[i][j]);
  }
}

static inline void tile_rows(int64_t n, const float* const* a, const float* b, int64_t depth, float* c, int64_t ldc,
                             bool add) {
  switch (n) {
    case 6: return tile<6>(a, b, depth, c, ldc, add);
    case 5: return tile<5>(a, b, depth, c, ldc, add);
    case 4: return tile<4>(a, b, depth, c, ldc, add);
    case 3: return tile<3>(a, b, depth, c, ldc, add);
    case 2: return tile<2>(a, b, depth, c, ldc, add);
    default: return tile<1>(a, b, depth, c, ldc, add);
  }
}

// Adds the outer products of n rows to R rows of c: c[i] += sum_r a[r][i] * b[r], for one tile of columns.
template <int R>
static inline void outer(const float* const* a, int64_t first, const float* b, int64_t ldb, int64_t n, float* c,
                         int64_t ldc) {
  V acc[R][NV];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = load(c + i * ldc + j * W);
  }
  for (int64_t r = 0; r < n; ++r, b += ldb) {
    const float* row = a[r] + first;
    V bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V av = splat(row[i]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * W, acc[i][j]);
  }
}

static inline void outer_rows(int64_t channels, const float* const* a, int64_t first, const float* b, int64_t ldb,
                              int64_t n, float* c, int64_t ldc) {
  switch (channels) {
    case 6: return outer<6>(a, first, b, ldb, n, c, ldc);
    case 5: return outer<5>(a, first, b, ldb, n, c, ldc);
    case 4: return outer<4>(a, first, b, ldb, n, c, ldc);
    case 3: return outer<3>(a, first, b, ldb, n, c, ldc);
    case 2: return outer<2>(a, first, b, ldb, n, c, ldc);
    default: return outer<1>(a, first, b, ldb, n, c, ldc);
  }
}

// Weights in the order that the tiles read them: [kernel_size][column tiles][depth][NR], zero in padded columns.
// `transposed`: the matrices of d(input), [f_out, f_in] per tap, else [f_in, f_out].
static void pack_weight(const MaskedConv& op, bool transposed, float* packed) {
  const int64_t depth = transposed ? op.f_out : op.f_in, columns = transposed ? op.f_in : op.f_out;
  const int64_t tiles = padded(columns) / NR;
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t kt = 0; kt < op.kernel_size * tiles; ++kt) {
    const int64_t k = kt / tiles, first = kt % tiles * NR;
    float* to = packed + kt * depth * NR;
    for (int64_t p = 0; p < depth; ++p) {
      for (int64_t j = 0; j < NR; ++j) {
        const int64_t column = first + j, out = transposed ? p : column, in = transposed ? column : p;
        *to++ = column < columns ? op.weight[(out * op.f_in + in) * op.kernel_size + k] : 0.0f;
      }
    }
  }
}

// Addresses of the rows that n table rows name, tap by tap: pointers[k * kBackwardBlock + r].
static inline void locate(const int32_t* table, int64_t n, int64_t kernel_size, const float* source, int64_t ld,
                          const float* zeros, const float** pointers) {
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t k = 0; k < kernel_size; ++k) {
      const int64_t row = table[r * kernel_size + k];
      pointers[k * kBackwardBlock + r] = row < 0 ? zeros : source + row * ld;
    }
  }
}

// c[r] = sum_k pointers[k][r] @ W_k for up to kBlock rows.
static void gather_gemm(const float* const* pointers, int64_t n, int64_t kernel_size, const float* packed,
                        int64_t depth, int64_t ldc, float* c) {
  for (int64_t k = 0; k < kernel_size; ++k) {
    for (int64_t first = 0; first < ldc; first += NR) {
      const float* b = packed + (k * ldc + first) * depth;
      for (int64_t r = 0; r < n; r += MR) {
        tile_rows(std::min<int64_t>(MR, n - r), pointers + k * kBackwardBlock + r, b, depth, c + r * ldc + first, ldc,
                  k > 0);
      }
    }
  }
}

// Index of the request that owns a row, for rows visited in ascending order.
class RequestOf {
 public:
  explicit RequestOf(const MaskedConv& op) : op_(op), end_(op.requests ? op.rows_per_request[0] : 0) {}
  int64_t operator()(int64_t row) {
    while (row >= end_) end_ += op_.rows_per_request[++request_];
    return request_;
  }

 private:
  const MaskedConv& op_;
  int64_t request_ = 0, end_;
};

static inline float sum(V v) {
  float total = 0.0f;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}

// Sum over f channels of fn(first channel) for whole vectors and fn1(channel) for the rest.
template <class Vec, class Scalar>
static inline float reduce(int64_t f, Vec vec, Scalar scalar) {
  V total = V{};
  int64_t i = 0;
  for (; i + W <= f; i += W) total += vec(i);
  float rest = 0.0f;
  for (; i < f; ++i) rest += scalar(i);
  return sum(total) + rest;
}

// vec(first channel) for whole vectors, scalar(channel) for the rest. Written out, since compilers cannot know that the
// arrays of an epilogue do not overlap and then work channel by channel.
template <class Vec, class Scalar>
static inline void each(int64_t f, Vec vec, Scalar scalar) {
  int64_t i = 0;
  for (; i + W <= f; i += W) vec(i);
  for (; i < f; ++i) scalar(i);
}

// A NaN fails the comparison and comes through.
static inline V relu(V a) { return a < V{} ? V{} : a; }
static inline float relu(float a) { return a < 0.0f ? 0.0f : a; }

static void forward(const MaskedConv& op, const MaskedConvForward& io) {
  const int64_t f = op.f_out, ldc = padded(f);
  Buffer packed(op.kernel_size * ldc * op.f_in);
  pack_weight(op, false, packed.get());
#pragma omp parallel num_threads(op.threads)
  {
    int64_t low, high;
    share(op.rows, omp_get_num_threads(), omp_get_thread_num(), &low, &high);
    Buffer zeros(op.f_in), block(kBlock * ldc);
    Array<const float*> pointers(op.kernel_size * kBackwardBlock);
    RequestOf request_of(op);
    for (int64_t begin = low; begin < high; begin += kBlock) {
      const int64_t n = std::min(kBlock, high - begin);
      locate(op.taps + begin * op.kernel_size, n, op.kernel_size, op.x, op.f_in, zeros.get(), pointers.get());
      gather_gemm(pointers.get(), n, op.kernel_size, packed.get(), op.f_in, ldc, block.get());
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = begin + r;
        float* z = block.get() + r * ldc;
        const float* m = op.mask + request_of(row) * f;
        each(f, [&](int64_t i) { store(z + i, load(z + i) + load(op.bias + i)); }, [&](int64_t i) { z[i] += op.bias[i]; });
        const float mean = reduce(f, [&](int64_t i) { return load(z + i); }, [&](int64_t i) { return z[i]; }) / f;
        const V vmean = splat(mean);
        const float variance = reduce(
            f, [&](int64_t i) { const V d = load(z + i) - vmean; return d * d; },
            [&](int64_t i) { return (z[i] - mean) * (z[i] - mean); }) / f;
        const float rstd = 1.0f / std::sqrt(variance + op.eps);
        if (io.conv != nullptr) {
          std::memcpy(io.conv + row * f, z, f * sizeof(float));
          io.mean[row] = mean;
          io.rstd[row] = rstd;
        }
        float* out = io.out + row * f;
        const float* add = io.residual == nullptr ? nullptr : io.residual + int64_t{io.residual_rows[row]} * f;
        const V vrstd = splat(rstd);
        each(
            f,
            [&](int64_t i) {
              const V a = (load(z + i) - vmean) * vrstd * load(op.ln_weight + i) + load(op.ln_bias + i);
              const V masked = load(m + i) * relu(a);
              store(out + i, add == nullptr ? masked : masked + load(add + i));
            },
            [&](int64_t i) {
              const float masked = m[i] * relu((z[i] - mean) * rstd * op.ln_weight[i] + op.ln_bias[i]);
              out[i] = add == nullptr ? masked : masked + add[i];
            });
      }
    }
  }
}

// What one thread sums up in backward.
struct Partial {
  Partial(const MaskedConv& op, int64_t ldc)
      : d_kernel(op.kernel_size * op.f_in * ldc), d_bias(ldc), d_ln_weight(ldc), d_ln_bias(ldc), d_mask(op.requests * ldc) {}
  Buffer d_kernel, d_bias, d_ln_weight, d_ln_bias, d_mask;
};

// dz of one row through mask, ReLU and LayerNorm, and the row's share of the parameters' gradients.
static inline void row_backward(const MaskedConv& op, const float* g, const float* z, float mean, float rstd, const float* m,
                                float* dz, float* d_mask, Partial* sums) {
  const int64_t f = op.f_out;
  float* d_bias = sums->d_bias.get();
  float* d_ln_weight = sums->d_ln_weight.get();
  float* d_ln_bias = sums->d_ln_bias.get();
  const V vmean = splat(mean), vrstd = splat(rstd);
  each(
      f,
      [&](int64_t i) {
        const V weight = load(op.ln_weight + i), up = load(g + i);
        const V normal = (load(z + i) - vmean) * vrstd, a = normal * weight + load(op.ln_bias + i);
        const V through = a > V{} ? up * load(m + i) : V{};
        store(d_mask + i, load(d_mask + i) + up * relu(a));
        store(d_ln_weight + i, load(d_ln_weight + i) + through * normal);
        store(d_ln_bias + i, load(d_ln_bias + i) + through);
        store(dz + i, through * weight);
      },
      [&](int64_t i) {
        const float normal = (z[i] - mean) * rstd, a = normal * op.ln_weight[i] + op.ln_bias[i];
        const float through = a > 0.0f ? g[i] * m[i] : 0.0f;
        d_mask[i] += g[i] * relu(a);
        d_ln_weight[i] += through * normal;
        d_ln_bias[i] += through;
        dz[i] = through * op.ln_weight[i];
      });
  const float average = reduce(f, [&](int64_t i) { return load(dz + i); }, [&](int64_t i) { return dz[i]; }) / f;
  const float slope = reduce(
      f, [&](int64_t i) { return load(dz + i) * ((load(z + i) - vmean) * vrstd); },
      [&](int64_t i) { return dz[i] * ((z[i] - mean) * rstd); }) / f;
  each(
      f,
      [&](int64_t i) {
        const V normal = (load(z + i) - vmean) * vrstd;
        const V value = vrstd * (load(dz + i) - splat(average) - normal * splat(slope));
        store(dz + i, value);
        store(d_bias + i, load(d_bias + i) + value);
      },
      [&](int64_t i) {
        dz[i] = rstd * (dz[i] - average - (z[i] - mean) * rstd * slope);
        d_bias[i] += dz[i];
      });
}

static void backward(const MaskedConv& op, const MaskedConvBackward& io) {
  const int64_t f = op.f_out, ldz = padded(f), ldx = padded(op.f_in);
  Buffer dz((op.rows + io.bags) * ldz);
  Buffer packed(io.d_x == nullptr ? 0 : op.kernel_size * ldx * f);
  if (io.d_x != nullptr) pack_weight(op, true, packed.get());
  // One per thread; each lives in its thread's scope, which ends after the sums over threads.
  Array<Partial*> partials(op.threads);
#pragma omp parallel num_threads(op.threads)
  {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t low, high;
    share(op.rows, threads, thread, &low, &high);
    Partial own(op, ldz);
    Partial* sums = partials.get()[thread] = &own;
    Buffer zeros(std::max(op.f_in, ldz));
    Array<const float*> pointers(op.kernel_size * kBackwardBlock);
    RequestOf request_of(op);
    for (int64_t begin = low; begin < high; begin += kBackwardBlock) {
      const int64_t n = std::min(kBackwardBlock, high - begin);
      for (int64_t row = begin; row < begin + n; ++row) {
        const int64_t request = request_of(row);
        row_backward(op, io.grad + row * f, io.conv + row * f, io.mean[row], io.rstd[row], op.mask + request * f,
                     dz.get() + row * ldz, sums->d_mask.get() + request * ldz, sums);
      }
      locate(op.taps + begin * op.kernel_size, n, op.kernel_size, op.x, op.f_in, zeros.get(), pointers.get());
      for (int64_t k = 0; k < op.kernel_size; ++k) {
        float* to = sums->d_kernel.get() + k * op.f_in * ldz;
        for (int64_t first = 0; first < ldz; first += NR) {
          for (int64_t channel = 0; channel < op.f_in; channel += MR) {
            outer_rows(std::min<int64_t>(MR, op.f_in - channel), pointers.get() + k * kBackwardBlock, channel,
                       dz.get() + begin * ldz + first, ldz, n, to + channel * ldz + first, ldz);
          }
        }
      }
    }
#pragma omp barrier
    // Pad rows with several readers: one row per bag, summed in the order of its members.
#pragma omp for schedule(static)
    for (int64_t bag = 0; bag < io.bags; ++bag) {
      float* to = dz.get() + (op.rows + bag) * ldz;
      for (int64_t at = io.bag_offsets[bag]; at < io.bag_offsets[bag + 1]; ++at) {
        const float* from = dz.get() + int64_t{io.bag_rows[at]} * ldz;
        for (int64_t i = 0; i < ldz; ++i) to[i] += from[i];
      }
    }
    if (io.d_x != nullptr) {
      share(op.rows_in, threads, thread, &low, &high);
      Buffer block(kBlock * ldx);
      for (int64_t begin = low; begin < high; begin += kBlock) {
        const int64_t n = std::min(kBlock, high - begin);
        locate(io.readers + begin * op.kernel_size, n, op.kernel_size, dz.get(), ldz, zeros.get(), pointers.get());
        gather_gemm(pointers.get(), n, op.kernel_size, packed.get(), f, ldx, block.get());
        for (int64_t r = 0; r < n; ++r) {
          std::memcpy(io.d_x + (begin + r) * op.f_in, block.get() + r * ldx, op.f_in * sizeof(float));
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < (io.residual_readers == nullptr ? 0 : io.residual_count); ++r) {
      const int64_t from = io.residual_readers[r];
      if (from < 0) {
        std::memset(io.d_residual + r * f, 0, f * sizeof(float));
      } else {
        std::memcpy(io.d_residual + r * f, io.grad + from * f, f * sizeof(float));
      }
    }
    // Sums over threads, in thread order.
#pragma omp for schedule(static)
    for (int64_t out = 0; out < f; ++out) {
      auto total = [&](Buffer Partial::*part, int64_t at) {
        float value = 0.0f;
        for (int t = 0; t < threads; ++t) value += (partials.get()[t]->*part).get()[at];
        return value;
      };
      io.d_bias[out] = total(&Partial::d_bias, out);
      io.d_ln_weight[out] = total(&Partial::d_ln_weight, out);
      io.d_ln_bias[out] = total(&Partial::d_ln_bias, out);
      for (int64_t q = 0; q < op.requests; ++q) io.d_mask[q * f + out] = total(&Partial::d_mask, q * ldz + out);
      for (int64_t in = 0; in < op.f_in; ++in) {
        for (int64_t k = 0; k < op.kernel_size; ++k) {
          io.d_weight[(out * op.f_in + in) * op.kernel_size + k] =
              total(&Partial::d_kernel, (k * op.f_in + in) * ldz + out);
        }
      }
    }
  }
}

}  // namespace TERACON_ISA
}  // namespace teracon
