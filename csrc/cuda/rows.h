// LayerNorm, the gates and their gradients, fused, a block a row: what stands between two products.
// T is the type of statistics and state; operands of products are stored in theirs. Each kernel reads
// its operands once from memory (again from L1) and is bound by that.
#pragma once

#include "../formulas.h"
#include "activations.h"
#include "dtype.h"
#include "layout.h"

namespace mmixer::cuda {

constexpr int row_threads = 128;

// Sums over the threads of a block, the same bits in every thread.
template <class T, int count>
class BlockSum {
 public:
  struct Shared {
    T warp[2][count][row_threads / 32];
  };

  MMIXER_DEVICE explicit BlockSum(Shared& shared) : shared_(shared) {}

  MMIXER_DEVICE void operator()(T (&x)[count]) {
    flip_ ^= 1;  // so that one synchronisation a sum is enough
    for (int i = 0; i < count; i++) {
      for (int mask = 16; mask; mask /= 2) x[i] += shuffle_xor(x[i], mask);
      if (thread_index() % 32 == 0) shared_.warp[flip_][i][thread_index() / 32] = x[i];
    }
    block_sync();
    for (int i = 0; i < count; i++) {
      x[i] = 0;
      for (int warp = 0; warp < row_threads / 32; warp++) x[i] += shared_.warp[flip_][i][warp];
    }
  }

 private:
  Shared& shared_;
  int flip_ = 0;
};

template <class T>
struct Statistics {
  T mean, r_std;
};

// Of row(0) ... row(H - 1), in two passes. Without LayerNorm 0 and 1.
template <class T, class Row, class Sum>
MMIXER_DEVICE Statistics<T> statistics(Row row, int H, T eps, bool has_norm, Sum& sum) {
  if (!has_norm) return {0, 1};
  T total[1] = {};
  for (int i = thread_index(); i < H; i += row_threads) total[0] += row(i);
  sum(total);
  const T mean = total[0] / H;
  T square[1] = {};
  for (int i = thread_index(); i < H; i += row_threads) square[0] += (row(i) - mean) * (row(i) - mean);
  sum(square);
  return {mean, reciprocal_root(square[0] / H + eps)};
}

// LayerNorm's scale and shift of one gate; 1 and 0 without it.
template <class T>
struct Affine {
  const T *weight, *bias;  // [H] or null

  // norms: [2][G][6][H] or null
  MMIXER_DEVICE Affine(const T* norms, int G, int group, int gate, int H)
      : weight(norms ? norms + (int64_t(group) * norm_gates + gate) * H : nullptr),
        bias(norms ? weight + int64_t(G) * norm_gates * H : nullptr) {}

  MMIXER_DEVICE T scale(int i) const { return weight ? load(weight + i) : T(1); }
  MMIXER_DEVICE T operator()(int i, T x_hat) const {
    return weight ? load(weight + i) * x_hat + load(bias + i) : x_hat;
  }
};

// dL/da of LN(a) = affine(x_hat), from dL/dy, and the parameters' gradients, added to the caller's sums
// (a thread adds to its own columns alone).
template <class T, class X, class Dy, class Store, class Sum>
MMIXER_DEVICE void norm_gradient(X x_hat, Dy dy, T r_std, const Affine<T>& affine, int H,
                                 T* grad_weight, T* grad_bias, bool first, Sum& sum, Store store) {
  if (!affine.weight) {
    for (int i = thread_index(); i < H; i += row_threads) store(i, dy(i));
    return;
  }
  T total[2] = {};
  for (int i = thread_index(); i < H; i += row_threads) {
    const T u = affine.scale(i) * dy(i);
    total[0] += u, total[1] += u * x_hat(i);
  }
  sum(total);
  for (int i = thread_index(); i < H; i += row_threads) {
    const T y = dy(i), x = x_hat(i);
    grad_weight[i] = (first ? T(0) : grad_weight[i]) + y * x;
    grad_bias[i] = (first ? T(0) : grad_bias[i]) + y;
    store(i, norm_backward(affine.scale(i) * y, x, total[0] / H, total[1] / H, r_std));
  }
}

}  // namespace mmixer::cuda
