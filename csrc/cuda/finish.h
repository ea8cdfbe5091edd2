// The end of a backward, in one launch: the gradients of W_g and of W_s's g half, which are
// products over the batch alone; the mean over the rows, taken from each column of the gradients of
// W_r, W_z and W_h; the sums of the norms' gradients; and copies of what is not in its tensor yet.
//
// A block owns 64 x 64 numbers of a product, a thread 8 of them, and takes the operands through
// shared memory, 16 samples at a time; or 32 columns of a sum (sums.h), or of a matrix, whose rows
// it reads twice; or a share of a copy. Blocks exchange nothing. The bound is memory's latency; at
// large batches, the products' additions.
#pragma once

#include "copy.h"
#include "sums.h"

namespace mmixer::cuda {

constexpr int tile_size = 64, tile_depth = 16;

// dtype is float32 or float64.
template <Dtype dtype>
class Finish {
 public:
  using T = Stored<dtype>;
  using Arguments = FinishArguments;
  union Shared {
    ColumnSums<T> sums;
    T tile[2][tile_depth][tile_size];
  };
  static constexpr int threads = 32 * sum_warps;
  static constexpr bool needs_cluster = false;

  static MMIXER_CONSTANT int blocks(const Arguments& a) {
    return summing_blocks(a) + copying_blocks(a);
  }

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    if (block_index() >= summing_blocks(a))
      return copy_share(a, block_index() - summing_blocks(a), sum_warps);
    Shared& shared = *static_cast<Shared*>(memory);
    const int set = block_index() / set_blocks(a);
    int block = block_index() % set_blocks(a);
    if (block < tiles(a.H, a.most_context_size)) return weight_g(shared, a, set, block);
    block -= tiles(a.H, a.most_context_size);
    if (block < weight_s_tiles(a)) return weight_s(shared, a, set, block);
    block -= weight_s_tiles(a);
    const int share = block / column_slices(a.H);
    const int64_t column = block % column_slices(a.H) * 32 + thread_index() % 32;
    if (share < step_gates)
      matrix(shared.sums, a, set, share, column);
    else
      norm(shared.sums, a, set, (share - step_gates) / norm_rows(a.has_context),
           (share - step_gates) % norm_rows(a.has_context), column);
  }

 private:
  static MMIXER_CONSTANT int tiles(int rows, int columns) {
    return (rows + tile_size - 1) / tile_size * ((columns + tile_size - 1) / tile_size);
  }
  static MMIXER_CONSTANT int weight_s_tiles(const Arguments& a) {
    return a.has_context ? tiles(a.H, a.H) : 0;
  }
  // Of a weight set: W_g and W_s, then slices of W_r, W_z, W_h and the scale and shift of each
  // gate.
  static MMIXER_CONSTANT int set_blocks(const Arguments& a) {
    return tiles(a.H, a.most_context_size) + weight_s_tiles(a) +
           (step_gates + (a.recurrence ? 2 * norm_rows(a.has_context) : 0)) * column_slices(a.H);
  }
  static MMIXER_CONSTANT int summing_blocks(const Arguments& a) { return a.count * set_blocks(a); }

  MMIXER_DEVICE static void weight_g(Shared& shared, const Arguments& a, int set, int tile) {
    const int C = int(a.context_size[set]);
    const int64_t first = int64_t(a.first + set) * a.B * a.H;
    product(
        shared, a, tile, C,
        [&](int64_t b, int row) {
          return load_as<T>(a.grad_a_g, a.operand, first + b * a.H + row);
        },
        [&](int64_t b, int column) {
          return load_as<T>(a.context[set], a.operand, b * a.context_stride[set] + column);
        },
        [&](int64_t row, int column, T x) {
          store_as(a.weight_g[set], a.weight_dtype, row * C + column, x);
        });
  }

  MMIXER_DEVICE static void weight_s(Shared& shared, const Arguments& a, int set, int tile) {
    const int64_t first = int64_t(a.first + set) * a.B * a.H;
    product(
        shared, a, tile, a.H,
        [&](int64_t b, int row) {
          return load(static_cast<const T*>(a.grad_a_s_sum) + first + b * a.H + row);
        },
        [&](int64_t b, int column) {
          return load_as<T>(a.g_bar, a.operand, first + b * a.H + column);
        },
        [&](int64_t row, int column, T x) {
          store_as(a.weight_s[set], a.weight_dtype, (2 * row + 1) * a.H + column, x);
        });
  }

  // A tile of [H][columns]: the sums over the batch of left(b, row) right(b, column).
  template <class Left, class Right, class Store>
  MMIXER_DEVICE static void product(Shared& shared, const Arguments& a, int tile, int columns,
                                    const Left& left, const Right& right, const Store& store) {
    constexpr int rows_of_thread = 2, columns_of_thread = 4;
    constexpr int across = tile_size / columns_of_thread;
    static_assert(threads * rows_of_thread * columns_of_thread == tile_size * tile_size);
    const int down = (a.H + tile_size - 1) / tile_size, thread = thread_index();
    const int first_row = tile % down * tile_size, first_column = tile / down * tile_size;
    if (first_column >= columns) return;  // another weight set has more
    const int row = thread / across * rows_of_thread, column = thread % across;
    T sum[rows_of_thread][columns_of_thread] = {};
    MMIXER_NO_UNROLL
    for (int first = 0; first < a.B; first += tile_depth) {
      if (first > 0) block_sync();  // the operands before have been read
      MMIXER_UNROLL
      for (int i = thread; i < tile_depth * tile_size; i += threads) {
        const int b = first + i / tile_size, at = i % tile_size;
        const bool exists = b < a.B;
        shared.tile[0][i / tile_size][at] =
            exists && first_row + at < a.H ? left(b, first_row + at) : T(0);
        shared.tile[1][i / tile_size][at] =
            exists && first_column + at < columns ? right(b, first_column + at) : T(0);
      }
      block_sync();
      MMIXER_UNROLL
      for (int b = 0; b < tile_depth; b++) {
        T x[columns_of_thread];
        MMIXER_UNROLL
        for (int j = 0; j < columns_of_thread; j++) x[j] = shared.tile[1][b][column + j * across];
        MMIXER_UNROLL
        for (int i = 0; i < rows_of_thread; i++) MMIXER_UNROLL
        for (int j = 0; j < columns_of_thread; j++) sum[i][j] += shared.tile[0][b][row + i] * x[j];
      }
    }
    MMIXER_UNROLL
    for (int i = 0; i < rows_of_thread; i++) MMIXER_UNROLL
    for (int j = 0; j < columns_of_thread; j++) {
      const int to = first_column + column + j * across;
      if (first_row + row + i < a.H && to < columns) store(first_row + row + i, to, sum[i][j]);
    }
  }

  MMIXER_DEVICE static void matrix(ColumnSums<T>& shared, const Arguments& a, int set, int gate,
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

  MMIXER_DEVICE static void norm(ColumnSums<T>& shared, const Arguments& a, int set, int kind,
                                 int row, int64_t column) {
    const int first_of_recurrence = norm_row(gate_r, a.has_context);
    const bool of_prologue = row < first_of_recurrence;
    const int64_t group = a.first + set;
    const int count = of_prologue ? a.prologue_summands[row] : a.recurrence_summands;
    const void* const summands = of_prologue ? a.prologue[row] : a.recurrence;
    const int64_t first =
        (of_prologue ? group * count * 2 + kind
                     : ((group * 2 + kind) * step_gates + row - first_of_recurrence) * count) *
            a.H +
        column;
    const int64_t step = int64_t(of_prologue ? 2 : 1) * a.H;
    const bool exists = column < a.H;
    const T sum = column_sum(shared, count, [&](int64_t i) {
      return exists ? load_of<T, dtype>(summands, first + i * step) : T(0);
    });
    if (exists && thread_index() < 32)
      store_as(a.norm[set][kind], a.norm_dtype, int64_t(row) * a.H + column, sum);
  }
};

}  // namespace mmixer::cuda
