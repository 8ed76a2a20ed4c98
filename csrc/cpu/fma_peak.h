#pragma once

namespace teracon {

// Highest fp32 rate of this machine, in GFLOP/s (a multiply-add is two operations), on `threads` threads at once.
double fma_peak(int threads);

// Which instructions `fma_peak` used: "avx512f", "avx2+fma" or "generic".
const char* fma_instructions();

}  // namespace teracon
