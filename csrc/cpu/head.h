#pragma once

#include <cstdint>

#include "element.h"

// What the operations on linear heads share. All arrays are dense and row-major.

namespace teracon {

// A matrix in one of two formats; the other pointer is null.
struct Matrix {
  const float* single;
  const Bf16* half;
};
struct MutableMatrix {
  float* single;
  Bf16* half;
  bool wanted() const { return single != nullptr || half != nullptr; }
};

// Logits of rows of hidden states, stored as E: hidden @ weight^T + bias. They are formed a block of labels at a time, so no array
// of [rows, labels] is needed.
template <class E>
struct Head {
  int64_t rows, labels, channels;
  const E* hidden;    // [rows, channels]
  Matrix weight;      // [labels, channels]
  const float* bias;  // [labels]
  int64_t block;      // labels in a block
  int threads;

  int64_t blocks() const { return (labels + block - 1) / block; }
  int64_t first(int64_t b) const { return b * block; }
  int64_t labels_of(int64_t b) const { return first(b) + block < labels ? block : labels - first(b); }
  // Rows as they are stored: a whole number of register tiles of every instruction set.
  int64_t padded_rows() const { return (rows + 31) / 32 * 32; }
};

// Labels asked for: any number per row, in any order.
struct Targets {
  int64_t count;
  const int64_t* labels;  // [count]
  const int64_t* row_of;  // [count]
};

// Gradients of a head's inputs; null where not needed.
struct HeadGradients {
  float* hidden;         // [rows, channels]
  MutableMatrix weight;  // [labels, channels]
  float* bias;           // [labels]
  bool add;              // to what weight (single) and bias hold

  bool wanted() const { return hidden != nullptr || weight.wanted() || bias != nullptr; }
};

}  // namespace teracon
