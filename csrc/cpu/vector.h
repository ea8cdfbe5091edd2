// Vectors as compiler vector types: one source for AVX-512, AVX2, SSE2 and NEON, no dependency, and
// operators that read like the formulas. Needs GCC or Clang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifndef MMIXER_ISA
#error "compile with -DMMIXER_ISA=<name>: each instruction set gets a namespace of its own"
#endif

namespace mmixer::cpu::MMIXER_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, vector_registers = 16;
#elif defined(__ARM_NEON)
constexpr int vector_bytes = 16, vector_registers = 32;
#else
constexpr int vector_bytes = 16, vector_registers = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t integer __attribute__((vector_size(vector_bytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t integer __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using IntVector = typename VectorOf<T>::integer;
template <class T>
constexpr int lanes = vector_bytes / int(sizeof(T));

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count` lanes from memory, zeros in the rest; count may exceed the lanes.
template <class T>
inline Vector<T> load(const T* p, int64_t count) {
  if (count >= lanes<T>) return load(p);
  T buffer[lanes<T>] = {};
  for (int64_t i = 0; i < count; i++) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
inline void store(T* p, Vector<T> v, int64_t count) {
  if (count >= lanes<T>) return store(p, v);
  for (int64_t i = 0; i < count; i++) p[i] = v[i];
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

template <class T>
inline Vector<T> select(IntVector<T> mask, Vector<T> a, Vector<T> b) {
  return (Vector<T>)((mask & (IntVector<T>)a) | (~mask & (IntVector<T>)b));
}

template <class T>
inline IntVector<T> lane_numbers() {
  IntVector<T> number;
  for (int i = 0; i < lanes<T>; i++) number[i] = i;
  return number;
}

// The lanes whose number is at least `first`, and zeros below.
template <class T>
inline Vector<T> keep_from(Vector<T> v, int first) {
  return (Vector<T>)((IntVector<T>)v & (lane_numbers<T>() >= first));
}

// The lanes whose number is below `end`, and zeros above.
template <class T>
inline Vector<T> keep_below(Vector<T> v, int end) {
  return (Vector<T>)((IntVector<T>)v & (lane_numbers<T>() < end));
}

#ifdef __clang__
#define MMIXER_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMIXER_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, IntVector<T>{__VA_ARGS__})
#endif

template <class T, int distance, int... lane>
inline Vector<T> add_rotated(Vector<T> v, std::integer_sequence<int, lane...>) {
  return v + MMIXER_SHUFFLE(T, v, v, ((lane + distance) % lanes<T>)...);
}

// The sum of all lanes, always added in the same order: halves, quarters, ...
template <class T, int distance = lanes<T> / 2>
inline T sum(Vector<T> v) {
  if constexpr (distance == 0)
    return v[0];
  else
    return sum<T, distance / 2>(
        add_rotated<T, distance>(v, std::make_integer_sequence<int, lanes<T>>{}));
}

// Adds the halves of blocks of 2 h lanes, a's into the lower half of each block and b's into the upper.
template <class T, int h, int... lane>
inline Vector<T> add_halves(Vector<T> a, Vector<T> b, std::integer_sequence<int, lane...>) {
  constexpr int L = lanes<T>;
  return MMIXER_SHUFFLE(T, a, b, (lane - lane % (2 * h) + lane % h + (lane & h ? L : 0))...) +
         MMIXER_SHUFFLE(T, a, b, (lane - lane % (2 * h) + lane % h + (lane & h ? L : 0) + h)...);
}

// The sums of four vectors at once, each to the bit that of sum().
template <class T>
inline void sum_four(const Vector<T>* v, T* total) {
  constexpr int L = lanes<T>;
  if constexpr (L < 4) {
    for (int i = 0; i < 4; i++) total[i] = sum<T>(v[i]);
  } else {
    constexpr auto sequence = std::make_integer_sequence<int, L>{};
    Vector<T> s = add_halves<T, L / 4>(add_halves<T, L / 2>(v[0], v[1], sequence),
                                       add_halves<T, L / 2>(v[2], v[3], sequence), sequence);
    if constexpr (L >= 16) s = add_halves<T, L / 8>(s, s, sequence);
    if constexpr (L >= 8) s = add_halves<T, 1>(s, s, sequence);
    total[0] = s[0], total[1] = s[L / 2], total[2] = s[L / 4], total[3] = s[3 * L / 4];
  }
}

template <class T, int... lane>
inline Vector<T> interleave_low(Vector<T> a, Vector<T> b, std::integer_sequence<int, lane...>) {
  return MMIXER_SHUFFLE(T, a, b, (lane / 2 + (lane % 2) * lanes<T>)...);
}

template <class T, int... lane>
inline Vector<T> interleave_high(Vector<T> a, Vector<T> b, std::integer_sequence<int, lane...>) {
  return MMIXER_SHUFFLE(T, a, b, (lanes<T> / 2 + lane / 2 + (lane % 2) * lanes<T>)...);
}

// rows[i][j] becomes rows[j][i]: log2(lanes) rounds of a perfect shuffle.
template <class T>
inline void transpose(Vector<T> (&rows)[lanes<T>]) {
  constexpr auto sequence = std::make_integer_sequence<int, lanes<T>>{};
  for (int round = 1; round < lanes<T>; round *= 2) {
    Vector<T> next[lanes<T>];
    for (int i = 0; i < lanes<T> / 2; i++) {
      next[2 * i] = interleave_low<T>(rows[i], rows[i + lanes<T> / 2], sequence);
      next[2 * i + 1] = interleave_high<T>(rows[i], rows[i + lanes<T> / 2], sequence);
    }
    for (int i = 0; i < lanes<T>; i++) rows[i] = next[i];
  }
}

// exp for x in [-87.3, 88.3], clamped outside; NaN stays NaN. Relative error below 2e-7.
inline Vector<float> exp(Vector<float> x) {
  using V = Vector<float>;
  const V low = broadcast(-87.3f), high = broadcast(88.3f);
  x = select<float>(x < low, low, select<float>(x > high, high, x));
  const V shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to integer in the low bits
  const V n = shifted - 12582912.f;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  return (V)((IntVector<float>)p + ((IntVector<float>)shifted << 23));
}

// Absolute error below 2e-7.
inline Vector<float> sigmoid(Vector<float> x) { return 1.f / (1.f + exp(-x)); }

// Relative error below 3e-7: an odd polynomial near 0, 1 - 2 / (exp(2 |x|) + 1) elsewhere.
inline Vector<float> tanh(Vector<float> x) {
  using V = Vector<float>;
  using I = IntVector<float>;
  const I sign = (I)x & INT32_MIN;
  const V magnitude = (V)((I)x ^ sign);
  const V square = x * x;
  V p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  p = p * square * x + x;
  const V tail = 1.f - 2.f / (exp(magnitude + magnitude) + 1.f);
  return select<float>(magnitude < 0.625f, p, (V)((I)tail | sign));
}

inline Vector<double> sigmoid(Vector<double> x) {
  for (int i = 0; i < lanes<double>; i++) x[i] = 1 / (1 + std::exp(-x[i]));
  return x;
}

inline Vector<double> tanh(Vector<double> x) {
  for (int i = 0; i < lanes<double>; i++) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace mmixer::cpu::MMIXER_ISA
