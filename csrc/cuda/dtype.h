// The floating types of the caller's tensors, told at run time.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "device.h"

namespace mmixer::cuda {

// 16 bits stand for themselves.
template <Dtype dtype>
using Stored = std::conditional_t<dtype == Dtype::float32, float,
                                  std::conditional_t<dtype == Dtype::float64, double, uint16_t>>;

template <class T, Dtype dtype>
MMIXER_DEVICE T value_of(Stored<dtype> x) {
  if constexpr (dtype == Dtype::bfloat16) return T(from_bfloat16(x));
  if constexpr (dtype == Dtype::float16) return T(from_float16(x));
  return T(x);
}

template <class T, Dtype dtype>
MMIXER_DEVICE T load_of(const void* p, int64_t i) {
  return value_of<T, dtype>(load(static_cast<const Stored<dtype>*>(p) + i));
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

template <class T>
MMIXER_DEVICE void store_as(void* p, Dtype dtype, int64_t i, T x) {
  switch (dtype) {
    case Dtype::float32: static_cast<float*>(p)[i] = float(x); break;
    case Dtype::float64: static_cast<double*>(p)[i] = double(x); break;
    case Dtype::bfloat16: static_cast<uint16_t*>(p)[i] = to_bfloat16(float(x)); break;
    default: static_cast<uint16_t*>(p)[i] = to_float16(float(x));
  }
}

}  // namespace mmixer::cuda
