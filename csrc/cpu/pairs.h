#pragma once

#include <cstdint>

namespace teracon {

// Rows of a table of three taps, split for minimal filtering F(2,3): (a, b) is a pair when b reads a's second and third tap as
// its first and second, as outputs one dilation apart do.
struct PairedRows {
  int32_t* pairs;    // [2 * pair_count]: a, b; room for `rows`
  int32_t* singles;  // [single_count]; room for `rows`
  int64_t pair_count, single_count;
};

// table: [rows, 3]; back: [back_rows, 3], where back[v][1] is the row whose second tap reads v, if there is just one.
// Greedy along each chain of rows, in the order of rows: the same pairs in every run.
void find_pairs(const int32_t* table, int64_t rows, const int32_t* back, int64_t back_rows, PairedRows* found);

}  // namespace teracon
