// Sums over the steps, and the end of a backward: the sums over the summands of the norms'
// gradients, the mean over the rows taken from each column of the gradients of W_r, W_z and W_h,
// and the copies of what is not yet in its tensor's dtype.
//
// A block owns 32 columns of one sum, a warp every 16th summand, eight of them in flight at once;
// the warps add their shares up through shared memory, in one order. The bound is memory's latency.
#pragma once

#include "copy.h"
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
    static_cast<T*>(a.wide_g_bar)[target] = load_of<T, dtype>(a.g_bar, target);
  }
};

// dtype is float32 or float64.
template <Dtype dtype>
class Finish {
 public:
  using T = Stored<dtype>;
  using Arguments = FinishArguments;
  using Shared = ColumnSums<T>;
  static constexpr int threads = 32 * sum_warps;
  static constexpr bool needs_cluster = false;

  static MMIXER_CONSTANT int blocks(const Arguments& a) {
    return summing_blocks(a) + copying_blocks(a);
  }

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    if (block_index() >= summing_blocks(a))
      return copy_share(a, block_index() - summing_blocks(a), sum_warps);
    Shared& shared = *static_cast<Shared*>(memory);
    const int index = block_index() / column_slices(a.H), set = index / shares(a);
    const int share = index % shares(a);
    const int64_t column = block_index() % column_slices(a.H) * 32 + thread_index() % 32;
    if (share < step_gates)
      matrix(shared, a, set, share, column);
    else
      norm(shared, a, set, (share - step_gates) / gates, (share - step_gates) % gates, column);
  }

 private:
  // Of a weight set: its matrices, and the scale and the shift of each gate.
  static MMIXER_CONSTANT int shares(const Arguments& a) {
    return step_gates + (a.recurrence ? 2 * gates : 0);
  }
  static MMIXER_CONSTANT int summing_blocks(const Arguments& a) {
    return a.count * shares(a) * column_slices(a.H);
  }

  MMIXER_DEVICE static void matrix(Shared& shared, const Arguments& a, int set, int gate,
                                   int64_t column) {
    const int64_t first = (int64_t(a.first + set) * step_gates + gate) * a.H * a.H + column;
    const bool exists = column < a.H;
    const auto at = [&](int64_t row) {
      return exists ? load(static_cast<const T*>(a.matrices) + first + row * a.H) : T(0);
    };
    const T mean = a.remove_mean ? column_sum(shared, a.H, at) / a.H : T(0);
    if (!exists) return;
    MMIXER_NO_UNROLL
    for (int first = thread_index() / 32; first < a.H; first += summed_at_once * sum_warps) {
      T x[summed_at_once];
      MMIXER_UNROLL
      for (int i = 0; i < summed_at_once; i++) {
        const int row = first + i * sum_warps;
        x[i] = row < a.H ? at(row) : T(0);
      }
      MMIXER_UNROLL
      for (int i = 0; i < summed_at_once; i++) {
        const int row = first + i * sum_warps;
        if (row < a.H)
          store_as(a.weight[set][gate], a.weight_dtype, int64_t(row) * a.H + column, x[i] - mean);
      }
    }
  }

  MMIXER_DEVICE static void norm(Shared& shared, const Arguments& a, int set, int kind, int gate,
                                 int64_t column) {
    const bool of_prologue = gate < gate_r;
    const int64_t group = a.first + set;
    const int count = of_prologue ? a.prologue_summands[gate] : a.recurrence_summands;
    const void* const summands = of_prologue ? a.prologue[gate] : a.recurrence;
    const int64_t first =
        (of_prologue ? group * count * 2 + kind
                     : ((group * 2 + kind) * step_gates + gate - gate_r) * count) *
            a.H +
        column;
    const int64_t step = int64_t(of_prologue ? 2 : 1) * a.H;
    const bool exists = column < a.H;
    const T sum = column_sum(shared, count, [&](int64_t i) {
      return exists ? load_of<T, dtype>(summands, first + i * step) : T(0);
    });
    if (exists && thread_index() < 32)
      store_as(a.norm[set][kind], a.norm_dtype, int64_t(gate) * a.H + column, sum);
  }
};

}  // namespace mmixer::cuda
