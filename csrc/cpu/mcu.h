// The CPU engine's interface: G weight sets over their sequences, forward and backward, on plain
// pointers. Every buffer is the caller's; nothing is kept between calls.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmixer::cpu {

enum class Mix { gated, concat };

// One weight set, its sequence and its context. Features are contiguous, weights row-major.
template <class T>
struct Group {
  const T* input;  // [T, B, input_size]
  int64_t input_stride_step, input_stride_sample, input_size;
  const T* context;  // [B, context_size]
  int64_t context_stride_sample, context_size;
  // T, or bfloat16 where the problem says so.
  const void *weight_f, *weight_g, *weight_s, *weight_r, *weight_z, *weight_h;
  const void *norm_weight, *norm_bias;  // [6, H], both null without LayerNorm
};

// Gradients of one group, contiguous, in the shapes of their tensors.
template <class T>
struct GroupGradient {
  T* input;  // null when not wanted
  T* context;
  T *weight_f, *weight_g, *weight_s, *weight_r, *weight_z, *weight_h;  // all null when not wanted
  T *norm_weight, *norm_bias;
};

template <class T>
struct Problem {
  int64_t groups, steps, batch, hidden;
  Mix mix;
  bool bfloat16_weights, bfloat16_norms;  // only where T is float
  bool recompute;  // forward saves only the states, backward computes the rest again
  T eps;
  int threads;
  const Group<T>* group;   // [G]
  const T* hx;             // [G, B, H] with contiguous rows, null for zeros
  int64_t hx_stride_group, hx_stride_sample;
  const int64_t* lengths;  // [B], each in 1..T; null when all are T
  double* recurrence_seconds = nullptr;  // where forward writes how long its recurrence took
};

// Elements that forward saves for backward, and that each needs as scratch memory.
template <class T>
int64_t saved_size(const Problem<T>& problem);
template <class T>
int64_t forward_workspace_size(const Problem<T>& problem, bool save);
template <class T>
int64_t backward_workspace_size(const Problem<T>& problem, bool need_weights);

// output [G, T, B, H] and h_n [G, B, H], contiguous; saved is null when no backward follows.
template <class T>
void forward(const Problem<T>& problem, T* output, T* h_n, T* saved, T* workspace);

// A gradient tensor's rows of H, contiguous each, at any strides.
template <class T>
struct Rows {
  const T* data;
  int64_t stride_group, stride_step, stride_sample;
};

// gradient [G]; grad_hx [G, B, H], contiguous.
template <class T>
void backward(const Problem<T>& problem, Rows<T> grad_output, Rows<T> grad_h_n, const T* saved,
              const GroupGradient<T>* gradient, T* grad_hx, T* workspace);

// Of "avx512", "avx2" and "baseline" those that this build and this processor have, the best first.
std::vector<std::string> instruction_sets();
// The one in use: the best, unless a test has asked for another.
std::string instruction_set();
// False where there is no such set. Not to be called beside a running call.
bool use_instruction_set(const std::string& name);

// What benchmarks measure this machine's limits by, see limits.h: multiply-adds of a team, with how
// many multiplications and additions they were, and a team's reading of a block of memory, each
// member its own part of it.
int64_t multiply_add(int64_t rounds, int threads);
void read(const float* memory, int64_t size, int64_t rounds, int threads);

}  // namespace mmixer::cpu
