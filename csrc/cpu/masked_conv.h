#pragma once

#include <cstdint>

#include "element.h"
#include "head_kernels.h"

namespace teracon {

// How the products of a convolution are formed; kMeasuredFaster takes what is faster for its rows.
enum class Algorithm { kMeasuredFaster, kDirect, kFiltered };

// A convolution's weights and the threads that work on it.
struct Convolution {
  int64_t f_in, f_out, kernel_size;
  const float* weight;  // [f_out, f_in, kernel_size]
  int threads;
};

// The masked convolution on packed rows; see teracon_fast/ops/masked_conv/api.py for the mathematics. All arrays are dense and
// row-major; activations are of type E, float or Bf16. A table entry of -1 reads zeros.
template <class E>
struct MaskedConv : Convolution {
  int64_t rows_in, rows, requests;
  const E* x;                       // [rows_in, f_in]
  const float* bias;                // [f_out]
  const float* ln_weight;           // [f_out]
  const float* ln_bias;             // [f_out]
  const float* mask;                // [requests, f_out]
  const int32_t* taps;              // [rows, kernel_size]
  const int32_t* readers;           // [rows_in, kernel_size]
  const int64_t* rows_per_request;  // [requests]
  float eps;
  Algorithm algorithm;  // kFiltered needs three taps
};

template <class E>
struct MaskedConvForward {
  const E* addend;               // [rows, f_out], added before LayerNorm; null when there is none
  const E* residual;             // null when there is none
  const int32_t* residual_rows;  // [rows]
  E* out;                        // [rows, f_out]
  E* conv;                       // [rows, f_out], what LayerNorm takes; null when backward will not run
  float* mean;                   // [rows]
  float* rstd;                   // [rows]
};

template <class E>
struct MaskedConvBackward {
  const E* grad;                    // [rows, f_out]
  const E* conv;                    // [rows, f_out]
  const float* mean;                // [rows]
  const float* rstd;                // [rows]
  const int32_t* bag_rows;          // see teracon_fast/packing
  const int32_t* bag_offsets;       // [bags + 1]
  int64_t bags;
  const int32_t* residual_readers;  // [residual_count], null when the residual needs no gradient
  int64_t residual_count;
  E* d_x;              // [rows_in, f_in], null when not needed
  float* d_weight;     // [f_out, f_in, kernel_size], null when not needed
  float* d_bias;       // [f_out]
  float* d_ln_weight;  // [f_out]
  float* d_ln_bias;    // [f_out]
  float* d_mask;       // [requests, f_out]
  E* d_residual;       // [residual_count, f_out]
  E* d_addend;         // [rows, f_out], null when not needed
};

template <class E>
struct Encode;

// One instruction set's kernels for activations of type E.
template <class E>
struct Kernels {
  const char* name;
  void (*forward)(const MaskedConv<E>&, const MaskedConvForward<E>&);
  void (*backward)(const MaskedConv<E>&, const MaskedConvBackward<E>&);
  // The encoder without gradient (encode.h): its weights, packed once into encoder_words() words a convolution.
  int64_t (*encoder_words)(int64_t f, int64_t kernel_size);
  void (*encoder_pack)(const Convolution&, int32_t* words);
  void (*encode)(const Encode<E>&);
  HeadKernels<E> head;
};

extern const Kernels<float> kGenericFloat;
extern const Kernels<Bf16> kGenericBf16;
#if defined(__x86_64__)
extern const Kernels<float> kAvx2Float;
extern const Kernels<Bf16> kAvx2Bf16;
extern const Kernels<float> kAvx512Float;
extern const Kernels<Bf16> kAvx512Bf16;     // multiplies in float32
extern const Kernels<Bf16> kAvx512Bf16Dot;  // multiplies pairs of bf16
#endif

// The kernels of the best instruction set that this machine has, or of the one that TERACON_CPU_ISA names.
// Throws std::runtime_error for an instruction set that is unknown or that this machine lacks.
template <class E>
const Kernels<E>& kernels();

// Name of that instruction set.
const char* cpu_isa();

}  // namespace teracon
