#pragma once

#include <cstdint>

#include "element.h"

namespace teracon {

// The whole encoder of one task for the last position, without gradient: see teracon_fast/model/encoder.py. Blocks of users go
// through all layers, each thread its own. E: what rows are stored as on the way.
template <class E>
struct Encode {
  int64_t users, length, items, f, kernel_size, convolutions;
  int64_t available;        // positions of a sequence that are seen, from its beginning: length less what is dropped at its end
  const int64_t* x;         // [users, length], item numbers below `items`
  const int64_t* lengths;   // [users], real positions among those seen
  const float* embedding;   // [items, f]
  const int32_t* words;     // [convolutions, encoder_words()], from Kernels::pack
  const float* bias;        // [convolutions, f]
  const float* ln_weight;   // [convolutions, f], times the mask
  const float* ln_bias;     // [convolutions, f], times the mask
  const float* pads;        // [convolutions + 1, length, f]: state of a pad at each position, layer 0 being the embedding
  const int32_t* dilations;  // [convolutions]
  // Offsets from the end that each layer produces, ascending: offsets[starts[l] .. starts[l + 1]); ranks[l][o] is how many of them
  // are below o.
  const int32_t* offsets;
  const int64_t* starts;  // [convolutions + 2]
  const int32_t* ranks;   // [convolutions + 1, length + 1]
  float eps;
  bool filtered;  // minimal filtering for pairs of rows; needs three taps
  int threads;
  float* out;  // [users, f]
};

}  // namespace teracon
