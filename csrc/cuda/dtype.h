// The floating types of the caller's tensors, told at run time.
#pragma once

#include "arguments.h"
#include "device.h"

namespace mmixer::cuda {

template <class T, Dtype dtype>
MMIXER_DEVICE T load_of(const void* p, int64_t i) {
  if constexpr (dtype == Dtype::float32) return T(load(static_cast<const float*>(p) + i));
  if constexpr (dtype == Dtype::float64) return T(load(static_cast<const double*>(p) + i));
  const uint16_t bits = load(static_cast<const uint16_t*>(p) + i);
  return T(dtype == Dtype::bfloat16 ? from_bfloat16(bits) : from_float16(bits));
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

MMIXER_DEVICE int size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A float32, bfloat16 or float16 as it lies in memory, to be converted where it is needed: a conversion
// waits for its load.
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
