#pragma once

#include <cstdint>

namespace teracon {

// The upper half of a float32.
struct Bf16 {
  uint16_t bits;
};

}  // namespace teracon
