#pragma once

#include <cstdint>

#include "head.h"

namespace teracon {

// Targets of a head grouped by their row, and by the block of labels that they lie in.
class TargetOrder {
 public:
  TargetOrder(const Targets& targets, int64_t rows, int64_t blocks, int64_t block);
  TargetOrder(const TargetOrder&) = delete;
  TargetOrder& operator=(const TargetOrder&) = delete;
  ~TargetOrder();

  int64_t* row_offsets;    // [rows + 1]: targets of row r are by_row[row_offsets[r]..row_offsets[r + 1]-1]
  int64_t* by_row;         // [count], in the given order within a row
  int64_t* block_offsets;  // [blocks + 1]
  int64_t* by_block;       // [count], rows ascending within a block
};

}  // namespace teracon
