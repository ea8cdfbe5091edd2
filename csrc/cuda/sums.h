// Sums of rows: of all steps, here, and others in finish.h. A block owns 32 columns of one sum, a
// warp every 16th row, eight of them in flight at once; the warps add their shares up through
// shared memory, in one order. The bound is memory's latency.
#pragma once

#include "rows.h"

namespace mmixer::cuda {

constexpr int sum_warps = 16, summed_at_once = 8;

template <class T>
struct ColumnSums {
  T value[sum_warps][32];
};

// The sum of at(i) over i < count, a lane's own: the same bits in each warp.
template <class T, class At>
MMIXER_DEVICE T column_sum(ColumnSums<T>& shared, int64_t count, const At& at) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  T sum = 0;
  MMIXER_NO_UNROLL
  for (int64_t first = warp; first < count; first += summed_at_once * sum_warps) {
    T x[summed_at_once];
    MMIXER_UNROLL
    for (int i = 0; i < summed_at_once; i++) {
      const int64_t number = first + i * sum_warps;
      x[i] = number < count ? at(number) : T(0);
    }
    MMIXER_UNROLL
    for (int i = 0; i < summed_at_once; i++) sum += x[i];
  }
  shared.value[warp][lane] = sum;
  block_sync();
  sum = 0;
  MMIXER_UNROLL
  for (int i = 0; i < sum_warps; i++) sum += shared.value[i][lane];
  return sum;
}

MMIXER_CONSTANT int column_slices(int H) { return (H + 31) / 32; }

// dtype is the operands'.
template <Dtype dtype>
struct StepSum {
  using T = Wide<dtype>;
  using Arguments = StepSumArguments;
  struct Shared {
    ColumnSums<T> grad_a, grad_g_bar;
  };
  static constexpr int threads = 32 * sum_warps;
  static constexpr bool needs_cluster = false;

  static MMIXER_CONSTANT int blocks(const Arguments& a) { return a.G * a.B * column_slices(a.H); }

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    Shared& shared = *static_cast<Shared*>(memory);
    const int row = block_index() / column_slices(a.H), group = row / a.B;
    const int column = block_index() % column_slices(a.H) * 32 + thread_index() % 32;
    const bool exists = column < a.H;
    const int64_t step = int64_t(a.B) * a.H, target = int64_t(row) * a.H + column;
    const int64_t first = target + group * (a.T - 1) * step;  // of [G][T][B][H]
    const T sum = column_sum(shared.grad_a, a.T, [&](int64_t t) {
      return exists ? load_of<T, dtype>(a.grad_a, first + t * step) : T(0);
    });
    T sum_g = 0;
    if (a.grad_g_bar)
      sum_g = column_sum(shared.grad_g_bar, a.T, [&](int64_t t) {
        return exists ? load_of<T, wide<dtype>>(a.grad_g_bar, first + t * step) : T(0);
      });
    if (!exists || thread_index() >= 32) return;
    static_cast<T*>(a.grad_a_sum)[target] = sum;
    if (a.grad_g_bar) static_cast<T*>(a.grad_g_bar_sum)[target] = sum_g;
  }
};

}  // namespace mmixer::cuda
