// The gates' functions, as the hardware approximates them or exact to a few float32 roundings.
#pragma once

#include <cmath>

#include "device.h"

namespace mmixer::cuda {

template <bool approximate>
struct Activation {
  template <class T>
  MMIXER_DEVICE static T tanh(T x) {
    if constexpr (approximate)
      return approximate_tanh(x);
    else
      return std::tanh(x);
  }

  template <class T>
  MMIXER_DEVICE static T sigmoid(T x) {
    if constexpr (approximate)
      return T(0.5) + T(0.5) * approximate_tanh(T(0.5) * x);
    else if constexpr (sizeof(T) == sizeof(float))
      // exp(x) has no normal reciprocal where x > 87.3; a NaN passes.
      return reciprocal_of_normal(1 + std::exp(-x > 87 ? T(87) : -x));
    else
      return 1 / (1 + std::exp(-x));
  }
};

}  // namespace mmixer::cuda
