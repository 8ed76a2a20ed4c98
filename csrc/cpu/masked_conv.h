#pragma once

#include <cstdint>

namespace teracon {

// The masked convolution on packed rows; see teracon_fast/ops/masked_conv.py for the mathematics. All arrays are dense,
// row-major, float32. A table entry of -1 reads zeros.
struct MaskedConv {
  int64_t rows_in, rows, f_in, f_out, kernel_size, requests;
  const float* x;                   // [rows_in, f_in]
  const float* weight;              // [f_out, f_in, kernel_size]
  const float* bias;                // [f_out]
  const float* ln_weight;           // [f_out]
  const float* ln_bias;             // [f_out]
  const float* mask;                // [requests, f_out]
  const int32_t* taps;              // [rows, kernel_size]
  const int64_t* rows_per_request;  // [requests]
  float eps;
  int threads;
};

struct MaskedConvForward {
  const float* residual;         // null when there is none
  const int32_t* residual_rows;  // [rows]
  float* out;                    // [rows, f_out]
  float* conv;                   // [rows, f_out], before LayerNorm; null when backward will not run
  float* mean;                   // [rows]
  float* rstd;                   // [rows]
};

struct MaskedConvBackward {
  const float* grad;                // [rows, f_out]
  const float* conv;                // [rows, f_out]
  const float* mean;                // [rows]
  const float* rstd;                // [rows]
  const int32_t* readers;           // [rows_in, kernel_size]
  const int32_t* bag_rows;          // see teracon_fast/packing.py
  const int32_t* bag_offsets;       // [bags + 1]
  int64_t bags;
  const int32_t* residual_readers;  // [residual_count], null when the residual needs no gradient
  int64_t residual_count;
  float* d_x;                       // [rows_in, f_in], null when not needed
  float* d_weight;                  // [f_out, f_in, kernel_size]
  float* d_bias;                    // [f_out]
  float* d_ln_weight;               // [f_out]
  float* d_ln_bias;                 // [f_out]
  float* d_mask;                    // [requests, f_out]
  float* d_residual;                // [residual_count, f_out]
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*forward)(const MaskedConv&, const MaskedConvForward&);
  void (*backward)(const MaskedConv&, const MaskedConvBackward&);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The kernels of the best instruction set that this machine has, or of the one that TERACON_CPU_ISA names.
// Throws std::runtime_error for an instruction set that is unknown or that this machine lacks.
const Kernels& kernels();

}  // namespace teracon
