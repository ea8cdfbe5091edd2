// The product kernel: any sizes, strides, transpositions and batches, for where there is no
// cuBLASLt, or it does not take a product.
//
// A block owns a tile of 64 x 64 results of one product of the batch, then the tile that lies
// `blocks` further; blocks exchange nothing, and a launch has a bounded number of them. The threads
// of a block share the operands' slices in shared memory: 64 rows and 64 columns, with zeros past
// the operands' ends, and `depth` of the terms that are summed. One thread sums a result (of 16
// bits, one warp's tensor core) in the order of the terms, so that equal inputs give equal bits.
// What bounds the kernel is the loads of slices: they move one element per thread, and the products
// wait for them.
#pragma once

#include "dtype.h"
#include "products.h"

namespace mmixer::cuda {

struct ProductArguments : Product {
  int blocks;
};

struct ProductTiles {
  static constexpr int size = 64;  // rows and columns of a tile
  int64_t columns, of_product, all;

  MMIXER_CONSTANT explicit ProductTiles(const Product& a)
      : columns((a.columns + size - 1) / size),
        of_product((a.rows + size - 1) / size * columns),
        all(of_product * a.batch) {}
};

// A tile's sums in float32 or float64: a thread has rows 16 apart and columns 16 apart.
template <Dtype dtype>
struct ProductSums {
  using T = Stored<dtype>;
  static constexpr int depth = 16, padding = 1;  // in shared memory a row begins a bank further
  static constexpr int of_thread = ProductTiles::size / 16;
  using Slice = T[ProductTiles::size][depth + padding];
  T sum[of_thread][of_thread] = {};

  MMIXER_DEVICE static int row(int i) { return thread_index() / 16 + 16 * i; }
  MMIXER_DEVICE static int column(int j) { return thread_index() % 16 + 16 * j; }

  MMIXER_DEVICE void add(const Slice& a, const Slice& b) {
    MMIXER_UNROLL
    for (int k = 0; k < depth; k++) MMIXER_UNROLL
    for (int i = 0; i < of_thread; i++) MMIXER_UNROLL
    for (int j = 0; j < of_thread; j++) sum[i][j] += a[row(i)][k] * b[column(j)][k];
  }

  template <class F>
  MMIXER_DEVICE void each(const F& f) const {
    MMIXER_UNROLL
    for (int i = 0; i < of_thread; i++) MMIXER_UNROLL
    for (int j = 0; j < of_thread; j++) f(row(i), column(j), sum[i][j]);
  }
};

// A tile's sums of 16-bit products: a warp has 16 rows and 32 columns. The tensor core's order of
// the 16 terms is free as long as both operands have the same, and a lane takes four neighbours.
template <Dtype dtype>
struct ProductSums16 {
  static constexpr int depth = 32, padding = 16;  // the 8-byte loads of half a warp meet 32 banks
  static constexpr int of_warp = 4;               // multiply_add's tiles of 8 columns
  using Slice = uint16_t[ProductTiles::size][depth + padding];
  float sum[of_warp][4] = {};

  MMIXER_DEVICE static int first_row() {
    return thread_index() / 64 * 16 + thread_index() % 32 / 4;
  }
  MMIXER_DEVICE static int first_column() { return thread_index() / 32 % 2 * 32; }

  MMIXER_DEVICE void add(const Slice& a, const Slice& b) {
    const int row = first_row(), column = first_column() + thread_index() % 32 / 4;
    MMIXER_UNROLL
    for (int n = 0; n < depth / 16; n++) {
      const int k = n * 16 + thread_index() % 4 * 4;
      const Word2 upper = load2(&a[row][k]), lower = load2(&a[row + 8][k]);
      const Word4 of_a = {{upper.word[0], lower.word[0], upper.word[1], lower.word[1]}};
      MMIXER_UNROLL
      for (int j = 0; j < of_warp; j++) {
        const Word2 of_b = load2(&b[column + 8 * j][k]);
        multiply_add<dtype == Dtype::float16>(sum[j], of_a, of_b.word[0], of_b.word[1]);
      }
    }
  }

  template <class F>
  MMIXER_DEVICE void each(const F& f) const {
    const int column = first_column() + thread_index() % 4 * 2;
    MMIXER_UNROLL
    for (int j = 0; j < of_warp; j++) MMIXER_UNROLL
    for (int i = 0; i < 4; i++) f(first_row() + i / 2 * 8, column + 8 * j + i % 2, sum[j][i]);
  }
};

template <Dtype dtype>
struct ProductKernel {
  using Arguments = ProductArguments;
  using Element = Stored<dtype>;
  using Sums = std::conditional_t<sizeof(Element) == 2, ProductSums16<dtype>, ProductSums<dtype>>;
  static constexpr int threads = 256, depth = Sums::depth;
  static constexpr bool needs_cluster = false;
  struct Shared {
    alignas(16) typename Sums::Slice a;
    alignas(16) typename Sums::Slice b;  // its rows are the operand's columns
  };

  // The number of a launch's blocks: as many as a GPU keeps busy, at most one per tile.
  static int blocks(const Product& a, int processors) {
    const int64_t most = int64_t(16) * processors;
    return int(ProductTiles(a).all < most ? ProductTiles(a).all : most);
  }

  // Loads the terms from `first` on of the tile's rows (or columns). Neighbouring threads load
  // neighbours in memory: terms, or else rows.
  MMIXER_DEVICE static void load_slice(typename Sums::Slice& slice, const Element* p,
                                       int64_t stride, bool terms_lie_together, int64_t rows,
                                       int64_t first, int64_t inner) {
    MMIXER_UNROLL
    for (int n = 0; n < ProductTiles::size * depth / threads; n++) {
      const int i = n * threads + thread_index();
      const int row = terms_lie_together ? i / depth : i % ProductTiles::size;
      const int term = terms_lie_together ? i % depth : i / ProductTiles::size;
      const int64_t k = first + term;
      const bool exists = row < rows && k < inner;
      slice[row][term] = exists
                             ? load(p + (terms_lie_together ? row * stride + k : k * stride + row))
                             : Element(0);
    }
  }

  MMIXER_DEVICE static void run(void* memory, const Arguments& a) {
    Shared& shared = *static_cast<Shared*>(memory);
    const ProductTiles tiles(a);
    for (int64_t tile = block_index(); tile < tiles.all; tile += a.blocks) {
      const int64_t batch = tile / tiles.of_product, in_product = tile % tiles.of_product;
      const int64_t row = in_product / tiles.columns * ProductTiles::size,
                    column = in_product % tiles.columns * ProductTiles::size;
      const Element* const of_a = static_cast<const Element*>(a.a.p) + batch * a.a.batch_stride +
                                  row * (a.a.transposed ? 1 : a.a.stride);
      const Element* const of_b = static_cast<const Element*>(a.b.p) + batch * a.b.batch_stride +
                                  column * (a.b.transposed ? a.b.stride : 1);
      Sums sums;
      MMIXER_NO_UNROLL
      for (int64_t first = 0; first < a.inner; first += depth) {
        block_sync();  // the slices before have been read
        load_slice(shared.a, of_a, a.a.stride, !a.a.transposed, a.rows - row, first, a.inner);
        load_slice(shared.b, of_b, a.b.stride, a.b.transposed, a.columns - column, first, a.inner);
        block_sync();
        sums.add(shared.a, shared.b);
      }
      sums.each([&](int i, int j, auto sum) {
        if (row + i < a.rows && column + j < a.columns)
          store_as(a.result, a.result_dtype,
                   batch * a.result_batch_stride + (row + i) * a.result_stride + column + j, sum);
      });
    }
  }
};

}  // namespace mmixer::cuda
