#include "pairs.h"

#include <vector>

namespace teracon {

void find_pairs(const int32_t* table, int64_t rows, const int32_t* back, int64_t back_rows, PairedRows* found) {
  std::vector<char> taken(rows);
  found->pair_count = found->single_count = 0;
  for (int64_t a = 0; a < rows; ++a) {
    if (taken[a]) continue;
    const int32_t* first = table + 3 * a;
    const int64_t shared = first[2];
    int64_t b = shared >= 0 && shared < back_rows ? back[3 * shared + 1] : -1;
    // Whatever the tables hold, a pair is made only of rows that read as one.
    if (b >= rows || b == a || (b >= 0 && (taken[b] || table[3 * b] != first[1] || table[3 * b + 1] != first[2]))) b = -1;
    if (b >= 0) {
      taken[a] = taken[b] = 1;
      found->pairs[2 * found->pair_count] = static_cast<int32_t>(a);
      found->pairs[2 * found->pair_count++ + 1] = static_cast<int32_t>(b);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (!taken[row]) found->singles[found->single_count++] = static_cast<int32_t>(row);
  }
}

}  // namespace teracon
