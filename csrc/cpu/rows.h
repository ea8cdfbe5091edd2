// What happens to one row of H values: LayerNorm, its gradient, and loops over a row's vectors.
//
// Rows of the engine's own buffers are padded to whole vectors. What the padding holds is never
// looked at: statistics mask it, matrix products stop at H, and rows of the caller's are not padded.
#pragma once

#include "../formulas.h"
#include "vector.h"

namespace mmixer::cpu::MMIXER_ISA {

// The rows of norm_weight and norm_bias.
enum Gate { F, G, S, R, Z, H, gates };

// To 64 bytes with every instruction set, so that what one call saves has one layout.
template <class T>
inline int64_t padded(int64_t size) {
  constexpr int64_t unit = 64 / sizeof(T);
  return (size + unit - 1) / unit * unit;
}

// sum over the row of value(j), a vector for the lanes from j on.
template <class T, class Value>
inline T sum_row(int64_t size, Value value) {
  Vector<T> total{};
  int64_t j = 0;
  for (; j + lanes<T> <= size; j += lanes<T>) total += value(j);
  if (j < size) total += keep_below<T>(value(j), int(size - j));
  return sum<T>(total);
}

// Scale, shift and the switch of a gate's LayerNorm. Without it: scale 1, shift 0.
template <class T>
struct Norm {
  const T *scale, *shift;  // padded
  bool enabled;

  Vector<T> operator()(const T* x_hat, int64_t j) const {
    return load(x_hat + j) * load(scale + j) + load(shift + j);
  }
};

// a becomes x_hat = (a - mean(a)) / sqrt(var(a) + eps), in place; returns 1 / sqrt(var(a) + eps).
template <class T>
inline T normalize(bool enabled, T* a, int64_t size, T eps) {
  if (!enabled) return 1;
  const T mean = sum_row<T>(size, [&](int64_t j) { return load(a + j); }) / T(size);
  const T variance = sum_row<T>(size, [&](int64_t j) {
                       const Vector<T> centred = load(a + j) - mean;
                       return centred * centred;
                     }) / T(size);
  const T r_std = 1 / std::sqrt(variance + eps);
  for (int64_t j = 0; j < size; j += lanes<T>) store(a + j, (load(a + j) - mean) * r_std);
  return r_std;
}

// dy becomes da, in place; adds dy * x_hat and dy to the gradients of scale and shift.
template <class T>
inline void normalize_backward(const Norm<T>& norm, T* dy, const T* x_hat, T r_std, T* d_scale,
                               T* d_shift, int64_t size) {
  if (!norm.enabled) return;
  for (int64_t j = 0; j < size; j += lanes<T>) {
    const Vector<T> v = load(dy + j);
    store(d_scale + j, load(d_scale + j) + v * load(x_hat + j));
    store(d_shift + j, load(d_shift + j) + v);
    store(dy + j, v * load(norm.scale + j));
  }
  const T mean_u = sum_row<T>(size, [&](int64_t j) { return load(dy + j); }) / T(size);
  const T mean_u_x_hat =
      sum_row<T>(size, [&](int64_t j) { return load(dy + j) * load(x_hat + j); }) / T(size);
  for (int64_t j = 0; j < size; j += lanes<T>)
    store(dy + j, norm_backward(load(dy + j), load(x_hat + j), broadcast(mean_u),
                                broadcast(mean_u_x_hat), broadcast(r_std)));
}

}  // namespace mmixer::cpu::MMIXER_ISA
