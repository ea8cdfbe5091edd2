// LayerNorm, the gates and their gradients, fused, as they stand between two products. A block owns
// a row, or some rows one after the other, and a thread up to four columns of each, in registers:
// the operands are read once from memory, all of a row at once, an activation is evaluated once,
// and what the threads exchange are sums over the row. Columns from 1024 on have no registers: they
// are read and evaluated at each use. Memory bounds them; with few blocks the latency of a row,
// about 2000 cycles.
//
// dtype is that of the products' operands; statistics and state are wide, float32 or float64.
#pragma once

#include <cmath>

#include "../formulas.h"
#include "activations.h"
#include "arguments.h"
#include "dtype.h"

namespace mmixer::cuda {

template <Dtype dtype>
constexpr Dtype wide = dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
template <Dtype dtype>
using Wide = Stored<wide<dtype>>;

constexpr int held_columns = 4;  // per thread
constexpr int warp_columns = 32 * held_columns, most_row_warps = 8;

MMIXER_CONSTANT int row_warps(int H) {
  return H < most_row_warps * warp_columns ? (H + warp_columns - 1) / warp_columns : most_row_warps;
}

MMIXER_DEVICE int first_column() {
  return thread_index() / 32 * warp_columns + thread_index() % 32;
}

// A column of a thread.
struct Column {
  int offset;   // from the thread's first column
  int slot;     // in the thread's registers
  bool exists;  // else its operands are zeros, and nothing is stored

  MMIXER_DEVICE bool is_held() const { return slot < held_columns; }
};

// Calls f(column) for the thread's columns that registers hold.
template <class F>
MMIXER_DEVICE void each_held_column(int H, F f) {
  MMIXER_UNROLL
  for (int slot = 0; slot < held_columns; slot++)
    f(Column{32 * slot, slot, first_column() + 32 * slot < H});
}

template <class F>
MMIXER_DEVICE void each_column(int H, F f) {
  each_held_column(H, f);
  constexpr int threads = 32 * most_row_warps;
  MMIXER_NO_UNROLL
  for (int i = threads * held_columns + thread_index(); i < H; i += threads)
    f(Column{i - first_column(), held_columns, true});
}

// A row in memory, read once as far as registers hold it. H = 0 means that there is none, and all
// its columns are `otherwise`. constant: the kernel does not write it.
template <Dtype dtype, bool constant = true>
class Row {
 public:
  MMIXER_DEVICE Row(const void* p, int64_t offset, int H, Stored<dtype> otherwise = 0)
      : p_(static_cast<const Stored<dtype>*>(p) + (offset + first_column())),
        exists_(H > 0),
        otherwise_(otherwise) {
    each_held_column(H, [&](Column c) { held_[c.slot] = c.exists ? at(c) : otherwise; });
  }

  MMIXER_DEVICE Wide<dtype> operator()(Column c) const {
    return decode<Wide<dtype>, dtype>(c.is_held() ? held_[c.slot] : exists_ ? at(c) : otherwise_);
  }

 private:
  MMIXER_DEVICE Stored<dtype> at(Column c) const {
    return constant ? load(p_ + c.offset) : p_[c.offset];
  }

  const Stored<dtype>* p_;
  bool exists_;
  Stored<dtype> otherwise_, held_[held_columns];
};

// A row to be written.
template <Dtype dtype>
class Result {
 public:
  MMIXER_DEVICE Result(void* p, int64_t offset)
      : p_(static_cast<Stored<dtype>*>(p) + (offset + first_column())) {}

  MMIXER_DEVICE void operator()(Column c, Wide<dtype> x) const {
    if (c.exists) p_[c.offset] = encode<dtype>(x);
  }

 private:
  Stored<dtype>* p_;
};

// The values f(column) of a thread's columns.
template <class F>
class Held {
 public:
  MMIXER_DEVICE Held(int H, F f) : f_(f) {
    each_held_column(H, [&](Column c) { held_[c.slot] = f(c); });
  }

  MMIXER_DEVICE auto operator()(Column c) const { return c.is_held() ? held_[c.slot] : f_(c); }

 private:
  F f_;
  decltype(f_(Column())) held_[held_columns];
};

// The means over rows of H columns.
template <class T>
class RowBlock {
 public:
  struct Shared {
    T sum[2][2][most_row_warps];
  };

  const int H;

  MMIXER_DEVICE RowBlock(void* shared, int columns)
      : H(columns), reciprocal_(T(1) / columns), shared_(*static_cast<Shared*>(shared)) {
    const int i = thread_index();  // zeroes the sums of warps that the block does not have
    static_assert(4 * most_row_warps <= 32, "a thread per sum, whatever the block");
    if (i % most_row_warps >= row_warps(H) && i < 4 * most_row_warps)
      shared_.sum[i / most_row_warps / 2][i / most_row_warps % 2][i % most_row_warps] = 0;
  }

  // Each x, a thread's sum over its columns, becomes the row's mean: the same bits in every thread.
  template <int count>
  MMIXER_DEVICE void means(T (&x)[count]) {
    flip_ ^= 1;  // so that one synchronisation is enough
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) {
      x[i] = warp_sum(x[i]);
      if (thread_index() % 32 == 0) shared_.sum[flip_][i][thread_index() / 32] = x[i];
    }
    block_sync();
    MMIXER_UNROLL
    for (int i = 0; i < count; i++) {
      x[i] = 0;
      MMIXER_UNROLL
      for (int warp = 0; warp < most_row_warps; warp++) x[i] += shared_.sum[flip_][i][warp];
      const T quotient = x[i] * reciprocal_;  // but for its last bit
      const T rest = reciprocal_ * std::fma(-quotient, T(H), x[i]);
      x[i] = rest == rest ? quotient + rest : quotient;  // an infinity has none
    }
  }

 private:
  const T reciprocal_;
  Shared& shared_;
  int flip_ = 0;
};

// LayerNorm before its scale and shift.
template <class T>
struct Normalization {
  T mean, r_std;

  MMIXER_DEVICE T operator()(T x) const { return (x - mean) * r_std; }
};

// The normalization by a row's statistics, found in two passes; the identity without LayerNorm.
template <class T, class X>
MMIXER_DEVICE Normalization<T> normalization(const X& x, RowBlock<T>& block, T eps, bool has_norm) {
  if (!has_norm) return {0, 1};
  T mean[1] = {}, square[1] = {};
  each_column(block.H, [&](Column c) { mean[0] += c.exists ? x(c) : T(0); });
  block.means(mean);
  each_column(block.H, [&](Column c) {
    const T y = x(c) - mean[0];
    square[0] += c.exists ? y * y : T(0);
  });
  block.means(square);
  return {mean[0], reciprocal_root(square[0] + eps)};
}

// LayerNorm's scale and shift of one gate; 1 and 0 without it.
template <Dtype dtype>
struct Affine {
  const bool exists;
  const Row<dtype> scale, shift;

  MMIXER_DEVICE Affine(const NormTable& norms, int G, int group, int gate, int H)
      : exists(norms.p),
        scale(norms.p, offset(norms, group, gate, H), exists ? H : 0, 1),
        shift(norms.p, offset(norms, G + group, gate, H), exists ? H : 0) {}

  MMIXER_DEVICE Wide<dtype> operator()(Column c, Wide<dtype> x_hat) const {
    return scale(c) * x_hat + shift(c);
  }

 private:
  MMIXER_DEVICE static int64_t offset(const NormTable& norms, int table, int gate, int H) {
    const bool has_context = norms.has_context;
    return (int64_t(table) * norm_rows(has_context) + norm_row(gate, has_context)) * H;
  }
};

// A row in memory, or none, to which rows are added. first: its memory is not zeroed yet.
template <class T>
class RowSum {
 public:
  MMIXER_DEVICE RowSum(void* p, int64_t offset, int H, bool first)
      : p_(static_cast<T*>(p) + (offset + first_column())), H_(p ? H : 0) {
    each_column(H_, [&](Column c) {
      const T before = first || !c.exists ? T(0) : p_[c.offset];
      at(c) = before;
    });
  }

  MMIXER_DEVICE void add(Column c, T x) {
    if (H_ > 0) at(c) += x;
  }

  MMIXER_DEVICE void store() const {
    each_held_column(H_, [&](Column c) {
      if (c.exists) p_[c.offset] = held_[c.slot];
    });
  }

 private:
  MMIXER_DEVICE T& at(Column c) { return c.is_held() ? held_[c.slot] : p_[c.offset]; }

  T* const p_;
  const int H_;
  T held_[held_columns] = {};
};

// The sums of the gradients of scale and shift.
template <class T>
struct AffineSums {
  RowSum<T> scale, shift;

  MMIXER_DEVICE void store() const { scale.store(), shift.store(); }
};

// Hands dL/da of LN(a) = affine(x_hat), from dL/dy, to grad_a(column, value).
template <class T, Dtype dtype, class X, class Dy, class GradA>
MMIXER_DEVICE void norm_gradient(const X& x_hat, const Dy& dy, T r_std, const Affine<dtype>& affine,
                                 RowBlock<T>& block, AffineSums<T>& sums, const GradA& grad_a) {
  T mean[2] = {};  // the means of u = dL/dx_hat and of u x_hat
  if (affine.exists) {
    each_column(block.H, [&](Column c) {
      const T y = dy(c), u = c.exists ? affine.scale(c) * y : T(0);
      mean[0] += u, mean[1] += u * x_hat(c);
    });
    block.means(mean);
  }
  each_column(block.H, [&](Column c) {
    const T y = dy(c), x = x_hat(c);
    sums.scale.add(c, y * x), sums.shift.add(c, y);
    grad_a(c, affine.exists ? norm_backward(affine.scale(c) * y, x, mean[0], mean[1], r_std) : y);
  });
}

// The members that all row kernels have in common.
template <Dtype dtype, class Arguments_>
struct RowKernel {
  using Arguments = Arguments_;
  using Shared = typename RowBlock<Wide<dtype>>::Shared;
  static constexpr int threads = 32 * most_row_warps;  // per block at most
  static constexpr bool needs_cluster = false;
};

}  // namespace mmixer::cuda
