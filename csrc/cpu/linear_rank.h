#pragma once

#include "head.h"

namespace teracon {

// Ranking with a linear head; see teracon_fast/ops/linear_rank/api.py. A target's rank is the number of labels with a higher logit, plus
// the equal ones at a lower label; every label counts before a logit that is not a number.

struct TopLabels {
  int64_t k;
  const int64_t* excluded;          // labels that are left out, ascending within a row; null for none
  const int64_t* excluded_offsets;  // [rows + 1]
  float* scores;                    // [rows, k], best first, -inf where labels run out
  int64_t* labels;                  // [rows, k], the lower label first among equal scores, -1 where the score is -inf
};

// The best labels of one row among those given to it, ascending.
class TopHeap {
 public:
  TopHeap(int64_t k, float* scores, int32_t* labels) : k_(k), scores_(scores), labels_(labels) {}
  // Only a higher score enters a full heap; NaN before it is full.
  float threshold() const;
  void push(float score, int32_t label);
  int64_t size() const { return size_; }
  const float* scores() const { return scores_; }
  const int32_t* labels() const { return labels_; }

 private:
  bool worse(int64_t a, int64_t b) const;
  void swap(int64_t a, int64_t b);

  int64_t k_, size_ = 0;
  float* scores_;
  int32_t* labels_;
};

bool is_excluded(const TopLabels& top, int64_t row, int64_t label);

// Writes a row's result from what several threads found.
void merge(const TopLabels& top, int64_t row, const TopHeap* const* heaps, int count);

}  // namespace teracon
