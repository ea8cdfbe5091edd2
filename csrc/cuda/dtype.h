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
  if constexpr (sizeof x > 2) return T(x);
  else return T(dtype == Dtype::bfloat16 ? from_bfloat16(x) : from_float16(x));
}

template <Dtype dtype, class T>
MMIXER_DEVICE Stored<dtype> encode(T x) {
  if constexpr (dtype == Dtype::bfloat16) return to_bfloat16(float(x));
  else if constexpr (dtype == Dtype::float16) return to_float16(float(x));
  else return Stored<dtype>(x);
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

}  // namespace mmixer::cuda
