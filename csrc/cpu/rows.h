// One row of H values: LayerNorm, its gradient, and loops over the row's vectors.
//
// Rows of the engine's own buffers are padded to whole vectors. The padding's values are never
// looked at: statistics mask it, matrix products stop at H, and rows of the caller's are not
// padded.
#pragma once

#include <algorithm>
#include <array>

#include "../formulas.h"
#include "../problem.h"
#include "vector.h"

namespace mmixer::cpu::MMIXER_ISA {

// A row's size, padded to 64 bytes with every instruction set, so that `saved` has one layout.
template <class T>
inline int64_t padded(int64_t size) {
  constexpr int64_t unit = 64 / sizeof(T);
  return (size + unit - 1) / unit * unit;
}

// The sums over the row of value(j)'s vectors, each for the lanes from j on: four sums side by side
// of each, so that none waits for the last addition.
template <class T, size_t count, class Value>
inline std::array<T, count> sum_rows(int64_t size, Value value) {
  constexpr int L = lanes<T>;
  Vector<T> total[count][4] = {};
  const auto add = [&](int64_t j, int i) {
    const std::array<Vector<T>, count> x = value(j);
    for (size_t n = 0; n < count; n++) total[n][i] += x[n];
  };
  int64_t j = 0;
  for (; j + 4 * L <= size; j += 4 * L)
    for (int i = 0; i < 4; i++) add(j + i * L, i);
  for (; j + L <= size; j += L) add(j, 0);
  if (j < size) {
    const std::array<Vector<T>, count> x = value(j);
    for (size_t n = 0; n < count; n++) total[n][1] += keep_below<T>(x[n], int(size - j));
  }
  std::array<T, count> sums;
  for (size_t n = 0; n < count; n++)
    sums[n] = sum<T>((total[n][0] + total[n][1]) + (total[n][2] + total[n][3]));
  return sums;
}

template <class T, class Value>
inline T sum_row(int64_t size, Value value) {
  return sum_rows<T, 1>(size, [&](int64_t j) { return std::array{value(j)}; })[0];
}

// Scale, shift and the switch of a gate's LayerNorm; without it scale is 1 and shift 0.
template <class T>
struct Norm {
  const T *scale, *shift;  // padded
  bool enabled;

  Vector<T> operator()(Vector<T> x_hat, int64_t j) const {
    return x_hat * load(scale + j) + load(shift + j);
  }
  Vector<T> operator()(const T* x_hat, int64_t j) const { return (*this)(load(x_hat + j), j); }
};

// A row's mean and 1 / sqrt(variance + eps); 0 and 1 without LayerNorm.
template <class T>
struct Statistics {
  T mean = 0, r_std = 1;

  Statistics() = default;
  Statistics(bool enabled, const T* a, int64_t size, T eps) {
    if (!enabled) return;
    mean = sum_row<T>(size, [&](int64_t j) { return load(a + j); }) / T(size);
    const T variance = sum_row<T>(size,
                                  [&](int64_t j) {
                                    const Vector<T> centred = load(a + j) - mean;
                                    return centred * centred;
                                  }) /
                       T(size);
    r_std = 1 / std::sqrt(variance + eps);
  }
  // a becomes x_hat, from j on.
  Vector<T> normalize(T* a, int64_t j) const {
    const Vector<T> x_hat = (load(a + j) - mean) * r_std;
    store(a + j, x_hat);
    return x_hat;
  }
};

// Calls body(i, find(i)) for i in [begin, end), where `find` gives statistics of row i. Those of
// some rows precede their bodies: each is a chain of dependent instructions, of which a processor
// runs several side by side where they follow one another.
template <class Find, class Body>
inline void with_statistics(int64_t begin, int64_t end, Find find, Body body) {
  constexpr int64_t together = 8;
  decltype(find(begin)) found[together];
  for (; begin < end; begin += together) {
    const int64_t count = std::min(together, end - begin);
    for (int64_t i = 0; i < count; i++) found[i] = find(begin + i);
    for (int64_t i = 0; i < count; i++) body(begin + i, found[i]);
  }
}

// dy becomes da, in place; adds dy * x_hat and dy to the gradients of scale and shift.
template <class T>
inline void normalize_backward(const Norm<T>& norm, T* dy, const T* x_hat, T r_std, T* d_scale,
                               T* d_shift, int64_t size) {
  if (!norm.enabled) return;
  const auto [sum_u, sum_u_x_hat] = sum_rows<T, 2>(size, [&](int64_t j) {
    const Vector<T> v = load(dy + j), x = load(x_hat + j), u = v * load(norm.scale + j);
    store(d_scale + j, load(d_scale + j) + v * x);
    store(d_shift + j, load(d_shift + j) + v);
    store(dy + j, u);
    return std::array{u, u * x};
  });
  const T mean_u = sum_u / T(size), mean_u_x_hat = sum_u_x_hat / T(size);
  for (int64_t j = 0; j < size; j += lanes<T>)
    store(dy + j, norm_backward(load(dy + j), load(x_hat + j), broadcast(mean_u),
                                broadcast(mean_u_x_hat), broadcast(r_std)));
}

}  // namespace mmixer::cpu::MMIXER_ISA
