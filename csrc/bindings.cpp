// The only file that knows torch: it declares the compiled operations to the dispatcher, nothing else.
//
// Built on the stable ABI, so one build serves the torch it was built with and later ones, and any Python.

#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/fma_peak.h"

namespace {

double fma_peak(int64_t threads) {
  STD_TORCH_CHECK(threads >= 1 && threads <= 4096, "fma_peak: got ", threads, " threads, expected 1 to 4096");
  return teracon::fma_peak(static_cast<int>(threads));
}

std::string fma_instructions() {
  return teracon::fma_instructions();
}

}  // namespace

// A fragment: the Python side of the package registers operations under the same name.
STABLE_TORCH_LIBRARY_FRAGMENT(teracon_fast, m) {
  m.def("fma_peak(int threads) -> float");
  m.def("fma_instructions() -> str");
}

// These take no tensor, so no device chooses between implementations.
STABLE_TORCH_LIBRARY_IMPL(teracon_fast, CompositeExplicitAutograd, m) {
  m.impl("fma_peak", TORCH_BOX(&fma_peak));
  m.impl("fma_instructions", TORCH_BOX(&fma_instructions));
}
