// A call's description, for the CPU and the CUDA engine alike: plain pointers, sizes and strides.
//
// G weight sets of one hidden size H run over T steps of B samples. Strides are in elements, and
// the last dimension of every tensor is contiguous.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace mmixer {

enum class Dtype : int { float32, float64, bfloat16, float16, int8 };

// The way in which f_bar and g_bar become f_tilde: Eq. 9-10, or Table 3's experiment II.
enum class Mix { gated, concat };

// The results that forward leaves for backward: nothing; the states alone, so that backward
// computes the rest again; or also what an engine finds worth its memory: the CPU engine the gates,
// the CUDA engine the activations of Eq. 7-10.
enum class Keep { nothing, states, gates };

// The order of a weight set's matrices.
enum Gate { gate_f, gate_g, gate_s, gate_r, gate_z, gate_h, gates };

// Whether a gate is there: without context Eq. 8-10 fall away, and f_tilde is f_bar.
MMIXER_HOST_DEVICE constexpr bool has_gate(int gate, bool has_context) {
  return has_context || (gate != gate_g && gate != gate_s);
}

// The rows of norm_weight and norm_bias, which are those of the gates that are there.
MMIXER_HOST_DEVICE constexpr int norm_rows(bool has_context) {
  return has_context ? gates : gates - 2;
}
MMIXER_HOST_DEVICE constexpr int norm_row(int gate, bool has_context) {
  return has_context || gate == gate_f ? gate : gate - 2;
}

// The parameters of one unit, contiguous and row-major.
struct WeightSet {
  // W_f [H, input_size], W_g [H, context_size], W_s [H, 2H] (the first H columns for f, the last
  // for g), W_r, W_z and W_h [H, H], in Problem::weight_dtype. W_g and W_s are null without
  // context.
  const void* weight[gates];
  // [norm_rows, H], in Problem::norm_dtype; both null without LayerNorm.
  const void *norm_weight, *norm_bias;
  // [norm_rows, H]: row n of an int8 matrix is that of integers times its gate's scale[n]. Null
  // with other weights.
  const float* scale;
};

// A weight set, its sequence and its context, which are in Problem::dtype.
struct Group : WeightSet {
  const void* input;  // [T, B, input_size]
  int64_t input_stride_step, input_stride_sample, input_size;
  const void* context;  // [B, context_size]; null without context
  int64_t context_stride_sample, context_size;
  // What depends on the context alone, [2, B, H], contiguous: g_bar (Eq. 8), then W_s's columns for
  // g times g_bar. The CPU engine alone takes it, where nothing is kept for backward; it then reads
  // neither context nor W_g nor these columns. Null where forward is to compute it.
  const void* share;
  bool reverse;  // each sample's sequence runs from its last step to its first
};

struct Problem {
  int64_t groups, steps, batch, hidden;  // G, T, B, H
  bool has_context;                      // of all groups, or of none
  Mix mix;                               // not read without context
  Keep keep;
  double eps;
  int threads;  // the CPU engine's most
  // The dtypes of inputs, contexts, hx, results and the gradients of all of these; of the matrices;
  // of the norms.
  Dtype dtype, weight_dtype, norm_dtype;
  const Group* group;  // [G]
  const void* hx;      // [G, B, H]; null for zeros
  int64_t hx_stride_group, hx_stride_sample;
  const int64_t* lengths;  // [B], each in 1..T; null where all are T
  // What cpu::pack wrote of the one group's weights. The CPU engine alone takes it, and where T > 1
  // reads it instead of W_f, W_s's columns for f, W_r, W_z and W_h. Null where forward is to pack.
  const void* packed;
};

// Where forward writes its results, in Problem::dtype; rows are contiguous. Output stands at the
// step of its input, also of a group that runs in reverse.
struct Results {
  void* output;  // [G, T, B, H]
  int64_t output_stride_group, output_stride_step, output_stride_sample;
  void* h_n;  // [G, B, H], contiguous
};

// The gradients of the results, which backward starts from; null for zeros.
struct Cotangents {
  const void* grad_output;  // [G, T, B, H]
  int64_t grad_output_stride_group, grad_output_stride_step, grad_output_stride_sample;
  const void* grad_h_n;  // [G, B, H]
  int64_t grad_h_n_stride_group, grad_h_n_stride_sample;
};

// The gradients of one group, which backward writes: contiguous, in the shapes of their tensors.
struct GroupGradient {
  void *input, *context;  // null where not wanted
  void* weight[gates];    // all null where not wanted, as the norms are; as in WeightSet else
  void *norm_weight, *norm_bias;
};

}  // namespace mmixer
