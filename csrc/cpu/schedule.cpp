#include "schedule.h"

#include <algorithm>
#include <numeric>

namespace mmixer::cpu {

Schedule::Schedule(int64_t steps, int64_t batch, const int64_t* lengths)
    : sample(batch), length(batch, steps), first_row(steps + 1, 0) {
  std::iota(sample.begin(), sample.end(), 0);
  if (lengths) {
    std::stable_sort(sample.begin(), sample.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    for (int64_t rank = 0; rank < batch; rank++) length[rank] = lengths[sample[rank]];
  }
  int64_t active = batch;
  for (int64_t t = 0; t < steps; t++) {
    while (active > 0 && length[active - 1] <= t) active--;
    first_row[t + 1] = first_row[t] + active;
    step_of_row.insert(step_of_row.end(), active, int32_t(t));
  }
}

}  // namespace mmixer::cpu
