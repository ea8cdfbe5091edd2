// The order in which samples and steps are worked on: rows are packed as in a PackedSequence.
#pragma once

#include <cstdint>
#include <vector>

namespace mmixer::cpu {

// Samples are ranked by length, longest first, so that those active at a step are a prefix. Row
// `first_row[t] + rank` is the t-th step of sample[rank] that is computed; past a sample's length
// there is no row.
struct Schedule {
  Schedule(int64_t steps, int64_t batch, const int64_t* lengths);

  int64_t rows() const { return int64_t(step_of_row.size()); }
  int64_t rank_of_row(int64_t row) const { return row - first_row[step_of_row[row]]; }
  // The number of samples active at step t; 0 at t = T.
  int64_t active(int64_t t) const {
    return t < int64_t(first_row.size()) - 1 ? first_row[t + 1] - first_row[t] : 0;
  }

  // Where the t-th step that is computed stands in the caller's tensors.
  int64_t step(int64_t t, int64_t rank, bool reverse) const {
    return reverse ? length[rank] - 1 - t : t;
  }

  std::vector<int64_t> sample;     // [B], of each rank
  std::vector<int64_t> length;     // [B], of each rank
  std::vector<int64_t> first_row;  // [T + 1]
  std::vector<int32_t> step_of_row;
};

}  // namespace mmixer::cpu
