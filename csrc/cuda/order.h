// The order in which the steps of a group run: as they lie in memory, or from each sample's last
// one back to the first. The recurrence's own tables have this order, so that its kernels go
// through them alike; inputs, a_f and what follows from it up to f_tilde, output and their
// gradients have the caller's. A step past a sample's length leaves the state as it is, before the
// sample's own steps or behind them.
#pragma once

#include "arguments.h"
#include "device.h"

namespace mmixer::cuda {

// The numbers of a sample's own steps, in the order in which they run.
struct OwnSteps {
  int first, count;

  MMIXER_DEVICE OwnSteps(int length, int T, bool reverse)
      : first(reverse ? T - length : 0), count(length) {}

  MMIXER_DEVICE bool contain(int step) const { return unsigned(step - first) < unsigned(count); }
};

// The rows of a sample in a table of the caller's, in the order in which its steps run.
struct RunRows {
  int64_t first, step;  // the offset of the first row, and of each to the one before

  MMIXER_DEVICE RunRows(const Strides& stride, int group, int sample, int T, bool reverse)
      : first(group * stride.group + sample * stride.sample +
              (reverse ? (T - 1) * stride.step : 0)),
        step(reverse ? -stride.step : stride.step) {}
};

}  // namespace mmixer::cuda
