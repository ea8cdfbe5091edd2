// Vectors as compiler vector types: one source for AVX-512, AVX2, SSE2 and NEON, no dependency, and
// operators that read like the formulas. They need GCC or Clang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef MMIXER_ISA
#error "compile with -DMMIXER_ISA=<name>: each instruction set gets a namespace of its own"
#endif

// The tests define it, to know which tiles have run.
#ifndef MMIXER_TILE
#define MMIXER_TILE(kernel, type, rows, columns)
#endif

namespace mmixer::cpu::MMIXER_ISA {

#if defined(MMIXER_VECTOR_BYTES)  // a test's: another set's vectors, of this set's instructions
constexpr int vector_bytes = MMIXER_VECTOR_BYTES, vector_registers = 32;
#elif defined(__AVX512F__)
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

// Loads the first `count` lanes from memory, and zeros into the rest; count may exceed the lanes.
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

// The upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

inline Vector<float> load(const bfloat16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // GCC 12 makes four instructions of the conversion below.
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
                                          16);
#else
  typedef uint16_t Half __attribute__((vector_size(vector_bytes / 2)));
  typedef uint32_t Whole __attribute__((vector_size(vector_bytes)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return (Vector<float>)(__builtin_convertvector(half, Whole) << 16);
#endif
}

inline Vector<float> load(const bfloat16* p, int64_t count) {
  if (count >= lanes<float>) return load(p);
  bfloat16 buffer[lanes<float>] = {};
  for (int64_t i = 0; i < count; i++) buffer[i] = p[i];
  return load(buffer);
}

// Calls body(std::integral_constant<int, value>) for a value in 1..largest.
template <int largest, class Body>
inline void with_constant(int64_t value, Body body) {
  if constexpr (largest > 1)
    if (value < largest) return with_constant<largest - 1>(value, body);
  body(std::integral_constant<int, largest>{});
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
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

// Adds the halves of blocks of 2 h lanes, a's into the lower half of each block and b's into the
// upper.
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

// Exchanges the upper half of each block of 2 h lanes of a with the lower half of that block of b.
template <class T, int h, int... lane>
inline void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int L = lanes<T>;
  const Vector<T> low = MMIXER_SHUFFLE(T, a, b, (lane & h ? L + lane - h : lane)...);
  b = MMIXER_SHUFFLE(T, a, b, (lane & h ? L + lane : lane + h)...);
  a = low;
}

// rows[i][j] becomes rows[j][i]: blocks of the upper right change places with those of the lower
// left, at each size of block.
template <class T, int h = lanes<T> / 2>
inline void transpose(Vector<T> (&rows)[lanes<T>]) {
  if constexpr (h > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; i++)
      if (!(i & h))
        exchange<T, h>(rows[i], rows[i + h], std::make_integer_sequence<int, lanes<T>>{});
    transpose<T, h / 2>(rows);
  }
}

// exp(x) = power * (1 + rest), power = 2^n the nearest to it.
struct ScaledExp {
  Vector<float> power, rest;
};

// The error of rest is below 5e-8, and relative to it below 1e-7 where power is 1. Beyond low or
// high, x is taken to be that; NaN stays NaN. -87.3 < low and high < 88 keep power a normal number.
inline ScaledExp scaled_exp(Vector<float> x, float low, float high) {
  using V = Vector<float>;
  x = x < low ? broadcast(low) : x;
  x = x > high ? broadcast(high) : x;
  const V shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to integer in the low bits
  const V n = shifted - 12582912.f;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const IntVector<float> bits = ((IntVector<float>)shifted << 23) + 0x3f800000;
  return {(V)bits, p * (r * r) + r};
}

// The relative error is below 1e-7 for x in [-87, 87]; x is clamped outside.
inline Vector<float> exp(Vector<float> x) {
  const ScaledExp e = scaled_exp(x, -87.f, 87.f);
  return e.power * e.rest + e.power;
}

// The relative error is below 2e-7 for x >= -87; below that the result stays, within 2e-38 of the
// truth.
inline Vector<float> sigmoid(Vector<float> x) { return 1.f / (1.f + exp(-x)); }

// The relative error is below 2e-7. tanh(x) = m / (m + 2), m = exp(2 x) - 1; beyond 10 it is 1.
inline Vector<float> tanh(Vector<float> x) {
  const ScaledExp e = scaled_exp(x + x, -20.f, 20.f);
  const Vector<float> m = e.power * e.rest + (e.power - 1.f);
  return m / (m + 2.f);
}

// libm's functions have relative errors below 5e-16; sigmoid only for x >= -709, below that it is
// within 1e-307.
inline Vector<double> sigmoid(Vector<double> x) {
  for (int i = 0; i < lanes<double>; i++) x[i] = 1 / (1 + std::exp(-x[i]));
  return x;
}

inline Vector<double> tanh(Vector<double> x) {
  for (int i = 0; i < lanes<double>; i++) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace mmixer::cpu::MMIXER_ISA
