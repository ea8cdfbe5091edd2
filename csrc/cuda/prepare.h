// The recurrent weights as the kernels and the products of torch read them, in one launch.
//
// A block owns 32 columns of one matrix. It takes the mean of each column (if asked: LayerNorm removes
// the mean over the rows anyway, and without it there is no mean to exchange), and writes the matrix
// for torch's products and, padded and split into bfloat16 terms, for the persistent kernels, there
// transposed for backward. Bound by reading the weights twice, from L2 the second time.
#pragma once

#include <type_traits>

#include "dtype.h"
#include "layout.h"

namespace mmixer::cuda {

// dtype: the weights'.
template <Dtype dtype>
struct Prepare {
  using T = std::conditional_t<dtype == Dtype::float64, double, float>;
  using Arguments = PrepareArguments;
  static constexpr int threads = 256, columns = 32, rows = threads / columns;
  static constexpr bool needs_cluster = false;

  struct Shared {
    T sum[rows][columns];
    float tile[columns][columns + 1];
  };

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    Shared& shared = *static_cast<Shared*>(memory);
    const int chunks = ((a.terms ? a.Hp : a.H) + columns - 1) / columns;
    const int local = block_index() / chunks / gates, gate = block_index() / chunks % gates;
    const int group = a.first + local, chunk = block_index() % chunks;
    const int64_t matrix = int64_t(group) * gates + gate;
    const int row = thread_index() / columns, lane = thread_index() % columns;
    const int column = chunk * columns + lane;
    const void* weight = a.set[local].weight[gate];

    if (gate == 0 && a.norms) copy_norms(a, local, chunk, chunks);

    T sum = 0;
    if (a.remove_mean && column < a.H)
      for (int i = row; i < a.H; i += rows)
        sum += load_of<T, dtype>(weight, int64_t(i) * a.H + column);
    shared.sum[row][lane] = sum;
    block_sync();
    T mean = 0;
    for (int i = 0; i < rows; i++) mean += shared.sum[i][lane];
    mean /= a.H;

    const int padded_rows = a.terms ? a.Hp : a.H;
    for (int first = 0; first < padded_rows; first += columns) {
      if (a.terms && a.transposed) block_sync();  // the tile before has been read
      for (int i = first + row; i < first + columns && i < padded_rows; i += rows) {
        const bool exists = i < a.H && column < a.H;
        const int64_t place = int64_t(i) * a.H + column;
        const T x = exists ? load_of<T, dtype>(weight, place) - mean : T(0);
        if (exists)
          store_as(a.matrices, a.matrices_dtype, matrix * a.H * a.H + place, x);
        if (!a.terms) continue;
        if (a.transposed)
          shared.tile[i - first][lane] = float(x);
        else
          store_terms(a, group, gate, int64_t(i) * a.Hp + column, float(x));
      }
      if (!a.terms || !a.transposed) continue;
      block_sync();
      for (int i = row; i < columns; i += rows)
        store_terms(a, group, gate, int64_t(chunk * columns + i) * a.Hp + first + lane,
                    shared.tile[lane][i]);
    }
  }

 private:
  MMIXER_DEVICE static void store_terms(const Arguments& a, int group, int gate, int64_t place,
                                        float x) {
    for (int part = 0; part < a.parts; part++) {
      const uint16_t term = to_bfloat16(x);
      a.terms[((int64_t(group) * a.parts + part) * gates + gate) * a.Hp * a.Hp + place] = term;
      x -= from_bfloat16(term);
    }
  }

  MMIXER_DEVICE static void copy_norms(const Arguments& a, int local, int chunk, int chunks) {
    const int size = norm_gates * a.H;
    for (int i = chunk * threads + thread_index(); i < 2 * size; i += chunks * threads) {
      const void* source = i < size ? a.set[local].norm_weight : a.set[local].norm_bias;
      static_cast<T*>(a.norms)[(int64_t(i / size) * a.G + a.first + local) * size + i % size] =
          load_as<T>(source, a.norm_dtype, i % size);
    }
  }
};

}  // namespace mmixer::cuda
