// The MCU's formulas (equation numbers: Lee et al., Modality Mixer) and their derivatives, written
// once for host and device, for scalars and for vector types alike.
#pragma once

#ifdef __CUDACC__
#define MMIXER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMIXER_HOST_DEVICE inline
#endif

namespace mmixer {

// gate * a + (1 - gate) * b: Eq. 10 with (s, f_bar, g_bar), Eq. 13 with (z, h_tilde, h).
template <class V>
MMIXER_HOST_DEVICE V interpolate(V gate, V a, V b) {
  return b + gate * (a - b);
}

// dL/dx of y = sigmoid(x), from dL/dy and y.
template <class V>
MMIXER_HOST_DEVICE V sigmoid_backward(V dy, V y) {
  return dy * (y - y * y);
}

// dL/dx of y = tanh(x), from dL/dy and y.
template <class V>
MMIXER_HOST_DEVICE V tanh_backward(V dy, V y) {
  return dy - dy * (y * y);
}

// dL/da of x_hat = (a - mean(a)) * r_std, from u = dL/dx_hat, mean(u) and mean(u * x_hat).
template <class V>
MMIXER_HOST_DEVICE V norm_backward(V u, V x_hat, V mean_u, V mean_u_x_hat, V r_std) {
  return r_std * (u - mean_u - x_hat * mean_u_x_hat);
}

}  // namespace mmixer
