#pragma once

#include <cstdint>
#include <vector>

namespace teracon {

// Tables of packed rows; see teracon_fast/packing for the terms and the meaning of each table. Arrays are dense and
// row-major.

// Spans of offsets [low, high): for each request its pad chain, then its streams.
struct Spans {
  int64_t count, length;
  const int32_t* low;
  const int32_t* high;
  const int32_t* chain;  // which span is the request's chain
  const int32_t* total;  // number of offsets in the request's sequences
};

// Rows of one layer: (span, offset) stands at row start[span] + rank[offset].
struct Layer {
  const int32_t* rank;         // [length + 1], number of the layer's offsets below each offset
  std::vector<int32_t> start;  // [spans]
  int64_t rows;                // start is valid where these are less than 2**31
};

Layer layer_rows(const Spans& spans, const int32_t* rank);

// A convolution's static lookups; a place is a row's rank among its layer's offsets. Taps read from the furthest back to the
// row itself, and each offset that is read is one of the input layer's or at least `length`.
struct Convolution {
  int64_t kernel_size, places_in, places_out;
  const int32_t* read_offset;    // [kernel_size, places_out]
  const int32_t* reader_offset;  // [kernel_size, places_in], offset of the reader through each tap, -1 none
};

// Output rows that read one pad row through one tap, for each such row and tap that has several, ascending in each bag.
struct Bags {
  std::vector<int32_t> rows;
  std::vector<int32_t> offsets;  // [bags + 1]
};

// Fills taps [rows_out, kernel_size] and readers [rows_in, kernel_size]; the same numbers with any number of threads.
Bags fill_taps(const Spans& spans, const Convolution& conv, const Layer& in, const Layer& out, int threads, int32_t* taps,
               int32_t* readers);

// Fills cells [rows of layer 0]: index into `x.reshape(-1)` of the item at each row; `users` [spans] are rows of x.
void fill_cells(const Spans& spans, const int64_t* users, const Layer& first, int64_t* cells);

}  // namespace teracon
