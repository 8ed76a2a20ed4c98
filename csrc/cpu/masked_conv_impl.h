// The masked convolution for one instruction set and both element types. Included by isa_*.cpp, which define TERACON_ISA, the
// name of the namespace, and what vector_impl.h asks for.
// Blocks of rows are fixed, and sums over rows are taken by a fixed thread and added in thread order, so results depend on the
// number of threads only, never on timing.

#include "isa_begin.h"

namespace teracon {
namespace TERACON_ISA {

#include "vector_impl.h"
#include "gemm_impl.h"
#include "weights_impl.h"
#include "rows_impl.h"
#include "weight_gradient_impl.h"

// The range of `count` that a thread owns, in nearly equal shares.
static inline void share(int64_t count, int threads, int thread, int64_t* low, int64_t* high) {
  *low = count * thread / threads;
  *high = count * (thread + 1) / threads;
}

// Pairs and single rows of a table, with the memory they stand in.
class OwnedPlan {
 public:
  // `back` [back_rows, kernel_size] is the table of the opposite direction.
  OwnedPlan(const int32_t* table, int64_t rows, const int32_t* back, int64_t back_rows, int64_t kernel_size,
            Algorithm algorithm)
      : pairs_(rows), singles_(rows), plan_{table, kernel_size, {pairs_.get(), singles_.get(), 0, rows}} {
    if (algorithm != Algorithm::kDirect && kernel_size == 3) {
      find_pairs(table, rows, back, back_rows, &plan_.split);
      // A few pairs do not pay for their packed weights.
      if (algorithm == Algorithm::kFiltered || plan_.split.pair_count >= kPairBlock) return;
    }
    plan_.split.pair_count = 0, plan_.split.single_count = rows;
    for (int64_t row = 0; row < rows; ++row) plan_.split.singles[row] = static_cast<int32_t>(row);
  }
  const RowPlan& operator*() const { return plan_; }
  const RowPlan* operator->() const { return &plan_; }

 private:
  Array<int32_t> pairs_, singles_;
  RowPlan plan_;
};

template <class E>
static PackedWeights<Operand<E>> pack(const MaskedConv<E>& op, const RowPlan& plan, bool transposed) {
  return PackedWeights<Operand<E>>(op, transposed, plan.split.single_count > 0, plan.split.pair_count > 0);
}

// Index of the request that owns a row.
class RequestOf {
 public:
  template <class E>
  explicit RequestOf(const MaskedConv<E>& op) : ends_(op.requests) {
    int64_t end = 0;
    for (int64_t q = 0; q < op.requests; ++q) ends_.get()[q] = end += op.rows_per_request[q];
  }
  int64_t operator()(int64_t row) {
    int64_t q = 0;
    while (row >= ends_.get()[q]) ++q;
    return q;
  }

 private:
  Array<int64_t> ends_;
};

// Addend, LayerNorm, ReLU, mask and residual of one row; z [ldc] holds its sums and is overwritten. A mask that is null is
// 1 in every channel.
template <class E>
static TERACON_INLINE void finish_row(const MaskedConv<E>& op, const MaskedConvForward<E>& io, int64_t row, int64_t request,
                                      float* z) {
  const int64_t f = op.f_out;
  const E* before = io.addend == nullptr ? nullptr : io.addend + row * f;
  V total = V{}, squares = V{};
  for (int64_t i = 0; i < f; i += W) {
    V value = load(z + i) + load_part(op.bias + i, f - i);
    if (before != nullptr) value += load_part(before + i, f - i);
    store(z + i, value);
    total += value;
  }
  const float mean = sum(total) / f;
  const V vmean = splat(mean);
  for (int64_t i = 0; i < f; i += W) {
    const V d = keep_part(load(z + i) - vmean, f - i);
    squares += d * d;
  }
  const float rstd = 1.0f / std::sqrt(sum(squares) / f + op.eps);
  const V vrstd = splat(rstd);
  const float* m = op.mask == nullptr ? nullptr : op.mask + request * f;
  const E* add = io.residual == nullptr ? nullptr : io.residual + int64_t{io.residual_rows[row]} * f;
  E* out = io.out + row * f;
  if (io.conv != nullptr) {
    io.mean[row] = mean;
    io.rstd[row] = rstd;
    for (int64_t i = 0; i < f; i += W) store_part(io.conv + row * f + i, load(z + i), f - i);
  }
  for (int64_t i = 0; i < f; i += W) {
    const int64_t left = f - i;
    const V a = (load(z + i) - vmean) * vrstd * load_part(op.ln_weight + i, left) + load_part(op.ln_bias + i, left);
    V y = relu(a);
    if (m != nullptr) y *= load_part(m + i, left);
    if (add != nullptr) y += load_part(add + i, left);
    store_part(out + i, y, left);
  }
}

template <class E>
static void forward(const MaskedConv<E>& op, const MaskedConvForward<E>& io) {
  const OwnedPlan plan(op.taps, op.rows, op.readers, op.rows_in, op.kernel_size, op.algorithm);
  const PackedWeights<Operand<E>> weights = pack(op, *plan, false);
  Array<E> zeros(op.f_in, true);
  const RowSource<E> source{op.x, op.f_in, op.f_in, zeros.get()};
  RequestOf request_of(op);
  in_parallel(op.threads, [&] {
    BlockBuffers<E> buffers(*weights);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < plan->blocks(); ++block) {
      run_block(*plan, block, *weights, source, &buffers,
                [&](int64_t row, float* z) { finish_row(op, io, row, request_of(row), z); });
    }
  });
}

// What one thread sums up in backward.
template <class E>
struct Partial {
  Partial(const MaskedConv<E>& op, int64_t f_in, int64_t ldz)
      : d_bias(ldz, true),
        d_ln_weight(ldz, true),
        d_ln_bias(ldz, true),
        d_mask(op.requests * ldz, true),
        d_kernel(op, f_in, ldz) {}
  Array<float> d_bias, d_ln_weight, d_ln_bias, d_mask;
  WeightGradient<E> d_kernel;
};

static TERACON_INLINE void add_to(float* p, V v) { store(p, load(p) + v); }

// dz [ldz] of one row through mask, ReLU and LayerNorm, and the row's share of the parameters' gradients. `work`: [ldz].
template <class E>
static TERACON_INLINE void row_backward(const MaskedConv<E>& op, const MaskedConvBackward<E>& io, int64_t row, int64_t request,
                                        int64_t ldz, float* work, E* dz, Partial<E>* sums) {
  const int64_t f = op.f_out;
  const E *g = io.grad + row * f, *z = io.conv + row * f;
  const float* m = op.mask + request * f;
  float* d_mask = sums->d_mask.get() + request * ldz;
  const float rstd = io.rstd[row];
  const V vmean = splat(io.mean[row]), vrstd = splat(rstd);
  V total = V{}, slopes = V{};
  for (int64_t i = 0; i < f; i += W) {
    const int64_t left = f - i;
    const V weight = load_part(op.ln_weight + i, left), up = load_part(g + i, left);
    const V normal = (load_part(z + i, left) - vmean) * vrstd, a = normal * weight + load_part(op.ln_bias + i, left);
    const V through = a > V{} ? up * load_part(m + i, left) : V{};
    add_to(d_mask + i, up * relu(a));
    add_to(sums->d_ln_weight.get() + i, through * normal);
    add_to(sums->d_ln_bias.get() + i, through);
    const V scaled = through * weight;
    store(work + i, scaled);
    total += scaled;
    slopes += scaled * normal;
  }
  const V average = splat(sum(total) / f), slope = splat(sum(slopes) / f);
  for (int64_t i = 0; i < f; i += W) {
    const V normal = (load_part(z + i, f - i) - vmean) * vrstd;
    const V value = keep_part(vrstd * (load(work + i) - average - normal * slope), f - i);
    store(dz + i, value);
    add_to(sums->d_bias.get() + i, value);
  }
  for (int64_t i = round_up(f, W); i < ldz; i += W) store(dz + i, V{});
}

template <class E>
static void backward(const MaskedConv<E>& op, const MaskedConvBackward<E>& io) {
  const int64_t f = op.f_out, ldz = round_up(f, NR);
  const bool need_input = io.d_x != nullptr, need_weight = io.d_weight != nullptr;
  const OwnedPlan plan(op.taps, op.rows, op.readers, op.rows_in, op.kernel_size, op.algorithm);
  const OwnedPlan back(op.readers, need_input ? op.rows_in : 0, op.taps, op.rows, op.kernel_size, op.algorithm);
  const PackedWeights<Operand<E>> weights = pack(op, *back, true);
  // Rows of dz are padded with zeros to whole tiles.
  Array<E> dz((op.rows + io.bags) * ldz), zeros(std::max(ldz, op.f_in), true);
  const RowSource<E> x{op.x, op.f_in, op.f_in, zeros.get()};
  const RowSource<E> gradients{dz.get(), round_up(f, Units<Operand<E>>::kDepth), ldz, zeros.get()};
  RequestOf request_of(op);
  // One per thread; each lives in its thread's scope, which ends after the sums over threads.
  Array<Partial<E>*> partials(op.threads);
  in_parallel(op.threads, [&] {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    int64_t low, high;
    Partial<E> own(op, need_weight ? op.f_in : 0, ldz);
    partials.get()[thread] = &own;
    Array<float> work(ldz);
    share(op.rows, threads, thread, &low, &high);
    for (int64_t row = low; row < high; ++row) {
      row_backward(op, io, row, request_of(row), ldz, work.get(), dz.get() + row * ldz, &own);
      if (io.d_addend != nullptr) std::memcpy(io.d_addend + row * f, dz.get() + row * ldz, f * sizeof(E));
    }
#pragma omp barrier
    // Pad rows with several readers: one row per bag, summed in the order of its members.
#pragma omp for schedule(static)
    for (int64_t bag = 0; bag < io.bags; ++bag) {
      E* to = dz.get() + (op.rows + bag) * ldz;
      for (int64_t i = 0; i < ldz; i += W) {
        V total = V{};
        for (int64_t at = io.bag_offsets[bag]; at < io.bag_offsets[bag + 1]; ++at) {
          total += load(dz.get() + int64_t{io.bag_rows[at]} * ldz + i);
        }
        store(to + i, total);
      }
    }
    if (need_weight) {
      share(plan->split.pair_count, threads, thread, &low, &high);
      own.d_kernel.add_pairs(*plan, low, high, x, gradients);
      share(plan->split.single_count, threads, thread, &low, &high);
      own.d_kernel.add_rows(*plan, low, high, x, gradients);
    }
    // Dynamic shares: whoever has finished its sums first takes more of these blocks.
    BlockBuffers<E> buffers(*weights);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < back->blocks(); ++block) {
      run_block(*back, block, *weights, gradients, &buffers, [&](int64_t row, float* sums) {
        for (int64_t i = 0; i < op.f_in; i += W) store_part(io.d_x + row * op.f_in + i, load(sums + i), op.f_in - i);
      });
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < (io.residual_readers == nullptr ? 0 : io.residual_count); ++r) {
      const int64_t from = io.residual_readers[r];
      if (from < 0) {
        std::memset(static_cast<void*>(io.d_residual + r * f), 0, f * sizeof(E));
      } else {
        std::memcpy(io.d_residual + r * f, io.grad + from * f, f * sizeof(E));
      }
    }
    // Sums over threads, in thread order.
#pragma omp for schedule(static)
    for (int64_t first = 0; first < f; first += W) {
      auto total = [&](Array<float> Partial<E>::*part, int64_t at, float* to) {
        V value = V{};
        for (int t = 0; t < threads; ++t) value += load((partials.get()[t]->*part).get() + at);
        store_part(to, value, f - first);
      };
      total(&Partial<E>::d_bias, first, io.d_bias + first);
      total(&Partial<E>::d_ln_weight, first, io.d_ln_weight + first);
      total(&Partial<E>::d_ln_bias, first, io.d_ln_bias + first);
      for (int64_t q = 0; q < op.requests; ++q) total(&Partial<E>::d_mask, q * ldz + first, io.d_mask + q * f + first);
      // [f_in * kernel_size] sums of W outputs at a time, W of them transposed at once.
      const int64_t pitch = need_weight ? op.f_in * op.kernel_size : 0;
      for (int64_t q = 0; q < pitch; q += W) {
        V v[W];
        for (int i = 0; i < W; ++i) {
          v[i] = V{};
          for (int t = 0; t < threads && q + i < pitch; ++t) {
            v[i] += load(partials.get()[t]->d_kernel.at((q + i) % op.kernel_size, (q + i) / op.kernel_size) + first);
          }
        }
        transpose(v);
        for (int j = 0; j < W && first + j < f; ++j) store_part(io.d_weight + (first + j) * pitch + q, v[j], pitch - q);
      }
    }
  });
}

#include "encode_impl.h"

}  // namespace TERACON_ISA
}  // namespace teracon
