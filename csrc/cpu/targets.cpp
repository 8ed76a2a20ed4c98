#include "targets.h"

#include <algorithm>
#include <vector>

namespace teracon {
namespace {

// A stable counting sort: fills `order` with the numbers at(0), .. at(count - 1), by the group of each.
template <class At, class Group>
void sort_by(int64_t groups, int64_t count, At at, Group group, int64_t* offsets, int64_t* order) {
  std::fill(offsets, offsets + groups + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++offsets[group(at(i)) + 1];
  for (int64_t g = 0; g < groups; ++g) offsets[g + 1] += offsets[g];
  std::vector<int64_t> next(offsets, offsets + groups);
  for (int64_t i = 0; i < count; ++i) order[next[group(at(i))]++] = at(i);
}

}  // namespace

TargetOrder::TargetOrder(const Targets& targets, int64_t rows, int64_t blocks, int64_t block)
    : row_offsets(new int64_t[rows + 1 + blocks + 1 + 2 * targets.count]),
      by_row(row_offsets + rows + 1),
      block_offsets(by_row + targets.count),
      by_block(block_offsets + blocks + 1) {
  const int64_t count = targets.count;
  sort_by(rows, count, [](int64_t i) { return i; }, [&](int64_t n) { return targets.row_of[n]; }, row_offsets, by_row);
  sort_by(blocks, count, [&](int64_t i) { return by_row[i]; }, [&](int64_t n) { return targets.labels[n] / block; },
          block_offsets, by_block);
}

TargetOrder::~TargetOrder() { delete[] row_offsets; }

}  // namespace teracon
