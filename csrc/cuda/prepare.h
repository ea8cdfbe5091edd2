// The recurrent weights as the kernels and the products of a pass read them, and whatever else has
// to be copied or cleared first, in one launch.
//
// A block owns 16 columns of one matrix, or copies a share of LayerNorm's parameters, or of
// something else (copy.h). It takes its columns into shared memory, by loads of 16 bytes where the
// address and H allow, and then all loads are in flight at once up to H = 512 (float64: 256). It
// takes the mean of each (if asked: LayerNorm removes the mean over the rows anyway, and without it
// there is no mean to exchange), and writes the matrix for the products and, padded and split into
// 16-bit terms, for the persistent kernels, there transposed for backward. Rows that shared memory
// does not hold at once are taken in turn, twice if there are means to take first. Blocks exchange
// nothing. The bound is one latency of memory and some 40 instructions per element.
#pragma once

#include "copy.h"

namespace mmixer::cuda {

// dtype is the weights'.
template <Dtype dtype>
class Prepare {
 public:
  using T = std::conditional_t<dtype == Dtype::float64, double, float>;
  using Arguments = PrepareArguments;
  static constexpr int threads = 256, columns = 16;
  static constexpr bool needs_cluster = false;

  static MMIXER_CONSTANT int blocks(const Arguments& a) {
    return own_blocks(a) + copying_blocks(a);
  }

  // Shared memory holds the columns' means and as many of their rows as fit.
  static MMIXER_CONSTANT size_t shared_bytes(const Arguments& a) {
    return sizeof(T) * columns * (1 + rows_held(a));
  }

  MMIXER_DEVICE static void run(void* shared, const Arguments& a) {
    if (block_index() >= own_blocks(a)) return copy_share(a, block_index() - own_blocks(a), warps);
    const int index = block_index() / slices(a), slice = block_index() % slices(a);
    if (index % shares < step_gates)
      Prepare(shared, a, index / shares, index % shares, slice).matrix();
    else if (a.norms)
      copy_norms(a, index / shares, slice);
  }

 private:
  static constexpr int shares = step_gates + 1;  // per weight set: its matrices, its norms
  static constexpr int warps = threads / 32, columns_of_warp = columns / warps;

  MMIXER_DEVICE Prepare(void* shared, const Arguments& arguments, int set_index, int gate,
                        int slice)
      : a(arguments),
        group(a.first + set_index),
        gate(gate),
        first_column(slice * columns),
        thread(thread_index()),
        weight(static_cast<const Stored<dtype>*>(a.weight[set_index][gate])),
        mean(static_cast<T*>(shared)),
        tile(mean + columns) {}

  static MMIXER_CONSTANT int own_blocks(const Arguments& a) { return a.count * shares * slices(a); }
  static MMIXER_CONSTANT int padded(const Arguments& a) { return a.split_weights ? a.Hp : a.H; }
  static MMIXER_CONSTANT int slices(const Arguments& a) {
    return (padded(a) + columns - 1) / columns;
  }

  // The rows held at once, a multiple of 8. Any device that runs this has 96 KiB of shared memory
  // for a block.
  static MMIXER_CONSTANT int rows_held(const Arguments& a) {
    constexpr int most = 96 * 1024 / (columns * sizeof(T)) - 8;
    const int all = (padded(a) + 7) / 8 * 8;
    return all < most ? all : most;
  }

  MMIXER_DEVICE void matrix() {
    const int held = rows_held(a);
    const bool are_all_held = padded(a) <= held;
    T sum[columns_of_warp] = {};
    if (thread < columns) mean[thread] = 0;
    // Loops are not unrolled: at H = 512 they have 16 rounds at most, and code costs time to fetch.
    MMIXER_NO_UNROLL
    for (int pass = a.remove_mean && !are_all_held ? 0 : 1; pass < 2; pass++) MMIXER_NO_UNROLL
    for (int first = 0; first < padded(a); first += held) {
      if (first > 0) block_sync();  // the rows held before have been read
      if (is_packed<dtype>(weight))
        take<Packed<dtype>>(first);
      else
        take<Single<dtype>>(first);
      block_sync();
      if (a.remove_mean && (pass == 0 || are_all_held)) {
        add(first, sum);
        store_means(sum);
        block_sync();
      }
      if (pass == 1) write(first);
    }
  }

  // Takes rows from number `first` on into shared memory; zeros for columns that do not exist.
  template <class Access>
  MMIXER_DEVICE void take(int first) {
    constexpr int accesses = columns / Access::count, step = threads / accesses;
    constexpr int at_once = 512 / step < 8 ? 512 / step : 8;
    const int column = thread % accesses * Access::count, count = rows_of(first, a.H);
    const bool exists = first_column + column < a.H;
    const int64_t stride = int64_t(step) * a.H;
    int row = thread / accesses;
    const Stored<dtype>* source = weight + int64_t(first + row) * a.H + first_column + column;
    MMIXER_NO_UNROLL
    for (; row < count; row += at_once * step, source += at_once * stride) {
      Access x[at_once];
      MMIXER_UNROLL
      for (int i = 0; i < at_once; i++)
        if (exists && row + i * step < count) x[i].load_from(source + i * stride);
      MMIXER_UNROLL
      for (int i = 0; i < at_once; i++) {
        if (row + i * step >= count) break;
        const int p = tile_offset(row + i * step, column);
        MMIXER_UNROLL
        for (int k = 0; k < Access::count; k++)
          tile[p ^ tile_offset(0, k)] = x[i].template get<T>(k);
      }
    }
  }

  // Adds the rows held: a warp has 2 columns, and a lane every 32nd row.
  MMIXER_DEVICE void add(int first, T (&sum)[columns_of_warp]) const {
    const int count = rows_of(first, a.H);
    for (int row = thread % 32; row < count; row += 32) MMIXER_UNROLL
    for (int i = 0; i < columns_of_warp; i++)
      sum[i] += tile[tile_offset(row, thread / 32 + i * warps)];
  }

  // Stores the means over the rows added so far.
  MMIXER_DEVICE void store_means(const T (&sum)[columns_of_warp]) {
    MMIXER_UNROLL
    for (int i = 0; i < columns_of_warp; i++) {
      const T total = warp_sum(sum[i]);
      if (thread % 32 == 0) mean[thread / 32 + i * warps] = total / a.H;
    }
  }

  MMIXER_DEVICE void write(int first) const {
    switch (a.matrices_dtype) {
      case Dtype::float32: write_matrix<Dtype::float32>(first); break;
      case Dtype::float64: write_matrix<Dtype::float64>(first); break;
      case Dtype::bfloat16: write_matrix<Dtype::bfloat16>(first); break;
      case Dtype::float16: write_matrix<Dtype::float16>(first); break;
      case Dtype::int8: break;  // `check` refuses it
    }
    if (!a.split_weights) return;
    if (a.transposed)
      write_terms<true>(first);
    else
      write_terms<false>(first);
  }

  template <Dtype to>
  MMIXER_DEVICE void write_matrix(int first) const {
    Stored<to>* const target =
        static_cast<Stored<to>*>(a.matrices) + (int64_t(group) * step_gates + gate) * a.H * a.H;
    if (is_packed<to>(a.matrices))
      write_matrix<Packed<to>>(target, first);
    else
      write_matrix<Single<to>>(target, first);
  }

  template <class Access, class Target>
  MMIXER_DEVICE void write_matrix(Target* target, int first) const {
    constexpr int accesses = columns / Access::count, step = threads / accesses;
    const int column = thread % accesses * Access::count, count = rows_of(first, a.H);
    if (first_column + column >= a.H) return;
    T m[Access::count];
    MMIXER_UNROLL
    for (int k = 0; k < Access::count; k++) m[k] = mean[column + k];
    int row = thread / accesses;
    target += int64_t(first + row) * a.H + first_column + column;
    MMIXER_NO_UNROLL
    for (; row < count; row += step, target += int64_t(step) * a.H) {
      const int p = tile_offset(row, column);
      Access x;
      MMIXER_UNROLL
      for (int k = 0; k < Access::count; k++) x.set(k, tile[p ^ tile_offset(0, k)] - m[k]);
      x.store_to(target);
    }
  }

  // Writes the terms: 16 bytes are 8 terms of a row or, where transposed, of a column.
  template <bool transposed>
  MMIXER_DEVICE void write_terms(int first) const {
    constexpr int step = 128;
    const int column = transposed ? thread / 4 % columns : thread % 2 * 8;
    if (first_column + column >= a.Hp) return;
    T m[8];
    MMIXER_UNROLL
    for (int k = 0; k < 8; k++) m[k] = mean[transposed ? column : column + k];
    const int count = rows_of(first, a.Hp), existing = a.H - first;
    int row = transposed ? (thread / 64 * 4 + thread % 4) * 8 : thread / 2;
    const int64_t size = int64_t(a.Hp) * a.Hp;
    uint16_t* target = a.split_weights + (int64_t(group) * a.terms * step_gates + gate) * size +
                       (transposed ? int64_t(first_column + column) * a.Hp + first + row
                                   : int64_t(first + row) * a.Hp + first_column + column);
    MMIXER_NO_UNROLL
    for (; row < count; row += step, target += transposed ? step : int64_t(step) * a.Hp) {
      const int p = tile_offset(row, column);
      float x[8];
      MMIXER_UNROLL
      for (int k = 0; k < 8; k++) {
        const float value =
            float(tile[p ^ (transposed ? tile_offset(k, 0) : tile_offset(0, k))] - m[k]);
        x[k] = row + (transposed ? k : 0) < existing ? value : 0;
      }
      if (a.term_dtype == Dtype::float16)
        store_terms<Dtype::float16>(target, step_gates * size, x);
      else
        store_terms<Dtype::bfloat16>(target, step_gates * size, x);
    }
  }

  template <Dtype to>
  MMIXER_DEVICE void store_terms(uint16_t* target, int64_t stride, float (&x)[8]) const {
    MMIXER_NO_UNROLL
    for (int written = 0;; target += stride) {
      Packed<to> term;
      MMIXER_UNROLL
      for (int k = 0; k < 8; k++) term.set(k, x[k]);
      term.store_to(target);
      if (++written == a.terms) return;
      MMIXER_UNROLL
      for (int k = 0; k < 8; k++) x[k] -= term.template get<float>(k);
    }
  }

  MMIXER_DEVICE static void copy_norms(const Arguments& a, int set_index, int slice) {
    const int size = norm_rows(a.has_context) * a.H;
    for (int i = slice * threads + thread_index(); i < 2 * size; i += slices(a) * threads) {
      const void* source = a.norm[set_index][i / size];
      static_cast<T*>(a.norms)[(int64_t(i / size) * a.G + a.first + set_index) * size + i % size] =
          load_as<T>(source, a.norm_dtype, i % size);
    }
  }

  // The number of rows held, from number `first` on, of a matrix of `rows` rows.
  MMIXER_DEVICE int rows_of(int first, int rows) const {
    const int held = rows_held(a);
    return rows - first < held ? rows - first : held;
  }

  // True where every row of the matrices [H][H] at p begins at a multiple of 16 bytes.
  template <Dtype of>
  MMIXER_DEVICE bool is_packed(const void* p) const {
    return (reinterpret_cast<uintptr_t>(p) | a.H * sizeof(Stored<of>)) % 16 == 0;
  }

  // An element's offset in the tile, such that no two 4-byte elements that a warp reads or writes
  // at once share a bank of shared memory, be they of neighbouring rows, of a column, or of 8
  // columns in each 8th row. tile_offset(row + k, column + l) is tile_offset(row, column) ^
  // tile_offset(k, l) where row and k, and column and l, have no bit in common.
  static MMIXER_CONSTANT int tile_offset(int row, int column) {
    return row * columns ^ column ^ (row >> 1 & 15) ^ (row << 1 & 16);
  }

  const Arguments& a;
  const int group, gate, first_column;
  const unsigned thread;
  const Stored<dtype>* const weight;
  T *const mean, *const tile;
};

}  // namespace mmixer::cuda
