// The floating types of the caller's tensors, told at run time.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "device.h"

namespace mmixer::cuda {

// An element as it lies in memory; 16 bits have no type of their own.
template <Dtype dtype>
using Stored = std::conditional_t<dtype == Dtype::float64, double,
                                  std::conditional_t<dtype == Dtype::float32, float, uint16_t>>;

template <class T, Dtype dtype>
MMIXER_DEVICE T decode(Stored<dtype> x) {
  if constexpr (sizeof x > 2)
    return T(x);
  else
    return T(dtype == Dtype::bfloat16 ? from_bfloat16(x) : from_float16(x));
}

template <Dtype dtype, class T>
MMIXER_DEVICE Stored<dtype> encode(T x) {
  if constexpr (dtype == Dtype::bfloat16)
    return to_bfloat16(float(x));
  else if constexpr (dtype == Dtype::float16)
    return to_float16(float(x));
  else
    return Stored<dtype>(x);
}

template <class T, Dtype dtype>
MMIXER_DEVICE T load_of(const void* p, int64_t i) {
  return decode<T, dtype>(load(static_cast<const Stored<dtype>*>(p) + i));
}

template <class T>
MMIXER_DEVICE T load_as(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float32: return load_of<T, Dtype::float32>(p, i);
    case Dtype::float64: return load_of<T, Dtype::float64>(p, i);
    case Dtype::bfloat16: return load_of<T, Dtype::bfloat16>(p, i);
    default: return load_of<T, Dtype::float16>(p, i);
  }
}

template <Dtype dtype, class T>
MMIXER_DEVICE void store_of(void* p, int64_t i, T x) {
  static_cast<Stored<dtype>*>(p)[i] = encode<dtype>(x);
}

template <class T>
MMIXER_DEVICE void store_as(void* p, Dtype dtype, int64_t i, T x) {
  switch (dtype) {
    case Dtype::float32: return store_of<Dtype::float32>(p, i, x);
    case Dtype::float64: return store_of<Dtype::float64>(p, i, x);
    case Dtype::bfloat16: return store_of<Dtype::bfloat16>(p, i, x);
    default: return store_of<Dtype::float16>(p, i, x);
  }
}

MMIXER_DEVICE int size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// The address of an element.
MMIXER_DEVICE void* element_at(void* p, Dtype dtype, int64_t i) {
  return static_cast<char*>(p) + i * size_of(dtype);
}

// A float32, bfloat16 or float16 as it lies in memory, to be converted where it is needed: a
// conversion waits for its load.
MMIXER_DEVICE uint32_t load_bits(const void* p, Dtype dtype) {
  return dtype == Dtype::float32 ? load(static_cast<const uint32_t*>(p))
                                 : load(static_cast<const uint16_t*>(p));
}

MMIXER_DEVICE float float_of_bits(uint32_t bits, Dtype dtype) {
  const float half = from_float16(uint16_t(bits)), bfloat = from_bfloat16(uint16_t(bits));
  return dtype == Dtype::float32 ? as_float(bits) : dtype == Dtype::bfloat16 ? bfloat : half;
}

MMIXER_DEVICE void store_bits(void* p, Dtype dtype, float x) {
  if (dtype == Dtype::float32)
    *static_cast<float*>(p) = x;
  else
    *static_cast<uint16_t*>(p) = dtype == Dtype::bfloat16 ? to_bfloat16(x) : to_float16(x);
}

// The elements that one access moves: one, or 16 bytes of neighbours at a multiple of 16.
template <Dtype dtype>
struct Single {
  static constexpr int count = 1;
  Stored<dtype> x{};

  MMIXER_DEVICE void load_from(const Stored<dtype>* p) { x = load(p); }
  MMIXER_DEVICE void store_to(Stored<dtype>* p) const { *p = x; }

  template <class T>
  MMIXER_DEVICE T get(int) const {
    return decode<T, dtype>(x);
  }

  template <class T>
  MMIXER_DEVICE void set(int, T value) {
    x = encode<dtype>(value);
  }
};

template <Dtype dtype>
struct Packed {
  static constexpr int count = sizeof(Word4) / sizeof(Stored<dtype>);
  Word4 words{};

  MMIXER_DEVICE void load_from(const Stored<dtype>* p) { words = load4(p); }
  MMIXER_DEVICE void store_to(Stored<dtype>* p) const { store4(p, words); }

  template <class T>
  MMIXER_DEVICE T get(int i) const {
    Stored<dtype> x;
    if constexpr (sizeof x == 2)
      x = uint16_t(words.word[i / 2] >> 16 * (i % 2));
    else
      memcpy(&x, &words.word[i * sizeof x / 4], sizeof x);
    return decode<T, dtype>(x);
  }

  // Sets bits that are zero: once per element.
  template <class T>
  MMIXER_DEVICE void set(int i, T value) {
    const Stored<dtype> x = encode<dtype>(value);
    if constexpr (sizeof x == 2)
      words.word[i / 2] |= uint32_t(x) << 16 * (i % 2);
    else
      memcpy(&words.word[i * sizeof x / 4], &x, sizeof x);
  }
};

}  // namespace mmixer::cuda
