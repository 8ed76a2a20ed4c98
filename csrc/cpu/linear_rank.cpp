#include "linear_rank.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

namespace teracon {

float TopHeap::threshold() const { return size_ < k_ ? std::numeric_limits<float>::quiet_NaN() : scores_[0]; }

// The worst is at the root.
bool TopHeap::worse(int64_t a, int64_t b) const {
  return scores_[a] < scores_[b] || (scores_[a] == scores_[b] && labels_[a] > labels_[b]);
}

void TopHeap::swap(int64_t a, int64_t b) {
  std::swap(scores_[a], scores_[b]);
  std::swap(labels_[a], labels_[b]);
}

void TopHeap::push(float score, int32_t label) {
  if (size_ < k_) {
    int64_t at = size_++;
    scores_[at] = score, labels_[at] = label;
    for (; at > 0 && worse(at, (at - 1) / 2); at = (at - 1) / 2) swap(at, (at - 1) / 2);
    return;
  }
  scores_[0] = score, labels_[0] = label;
  for (int64_t at = 0;;) {
    int64_t next = 2 * at + 1;
    if (next >= size_) return;
    if (next + 1 < size_ && worse(next + 1, next)) ++next;
    if (!worse(next, at)) return;
    swap(at, next);
    at = next;
  }
}

bool is_excluded(const TopLabels& top, int64_t row, int64_t label) {
  if (top.excluded == nullptr) return false;
  return std::binary_search(top.excluded + top.excluded_offsets[row], top.excluded + top.excluded_offsets[row + 1], label);
}

void merge(const TopLabels& top, int64_t row, const TopHeap* const* heaps, int count) {
  std::vector<std::pair<float, int32_t>> all;
  for (int t = 0; t < count; ++t) {
    for (int64_t i = 0; i < heaps[t]->size(); ++i) all.emplace_back(-heaps[t]->scores()[i], heaps[t]->labels()[i]);
  }
  std::sort(all.begin(), all.end());
  const int64_t found = std::min<int64_t>(top.k, static_cast<int64_t>(all.size()));
  for (int64_t i = 0; i < top.k; ++i) {
    top.scores[row * top.k + i] = i < found ? -all[i].first : -std::numeric_limits<float>::infinity();
    top.labels[row * top.k + i] = i < found && all[i].first < std::numeric_limits<float>::infinity() ? all[i].second : -1;
  }
}

}  // namespace teracon
