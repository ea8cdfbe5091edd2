// The kernels' arguments: addresses, sizes and options. T is the type of statistics and states,
// float32 or, for float64 operands, float64; dtype is that of the products' operands.
#pragma once

#include "../problem.h"

namespace mmixer::cuda {

// The gates of a step of the recurrence, as its arrays number them.
enum StepGate { step_r, step_z = gate_z - gate_r, step_h = gate_h - gate_r, step_gates };
static_assert(gate_r + step_gates == gates);

// Strides in elements; the last dimension is contiguous.
struct Strides {
  int64_t group, step, sample;
};

constexpr int most_weight_sets = 16;  // per PrepareArguments

struct ForwardArguments {
  const uint16_t* weights;   // [G][terms][3][Hp][Hp], Hp the padded hidden size
  const float* input_gates;  // [G][T][B][3][H]: W f_tilde
  const float* norms;        // [2][G][6][H]: weight and bias of LayerNorm; null without
  const float* hx;           // [G][B][H] or null: zeros
  const int64_t* lengths;    // [B] or null
  float* states;             // [G][T][B][H]
  void* packets;             // Plan::packets bytes per team that exchanges through L2
  int G, T, B, H;
  int first_team;  // teams are numbered through G, then tiles of a team's samples
  float eps;
};

struct BackwardArguments {
  const uint16_t* weights;  // [G][terms][3][Hp][Hp], transposed
  const float* x_hat;       // [G][3][T][B][H]
  const float* projected;   // V: like x_hat; null without LayerNorm
  const float* r_std;       // [G][3][T][B]
  const float* norms;       // as in ForwardArguments
  const float* states;      // [G][T][B][H]
  const float* hx;          // [G][B][H] or null
  const int64_t* lengths;
  const void* grad_output;  // [G][T][B][H] with strides, the last 1
  const float* grad_h_n;    // [G][B][H]; may be grad_hx
  void* grad_gates;         // da: [G][T][B][3][H]
  float* grad_f_tilde;      // [G][T][B][H]
  float* grad_hx;           // [G][B][H]
  float* grad_norm;         // [G][2][3][B][H]: of norm_weight, norm_bias; a sum per sample
  void* packets;
  Strides grad_output_stride;
  Dtype grad_output_dtype, grad_gates_dtype;
  int G, T, B, H;
  int first_team;
};

struct PrepareArguments {
  // This launch's sets, of which W_r, W_z and W_h and the norms are read.
  WeightSet set[most_weight_sets];
  int first, count;  // the number of the first set among all G, and the number of sets
  Dtype weight_dtype, norm_dtype;
  bool remove_mean, transposed;
  void* matrices;  // [G][3][H][H] in matrices_dtype
  Dtype matrices_dtype;
  // [G][terms][3][Hp][Hp] in term_dtype, 16-byte aligned, or null: `terms` bfloat16 terms per
  // weight, or the weight in float16 and terms = 1. Hp is a multiple of 8.
  uint16_t* split_weights;
  Dtype term_dtype;
  void* norms;  // [2][G][6][H] of T, or null
  int G, H, Hp, terms;
};

// G weight sets have `rows` rows each, which `blocks` blocks share, at most as many as rows.
struct RowSizes {
  int G, rows, H, blocks;
};

struct NormTanhArguments : RowSizes {
  const void* a;      // [G][rows][H] of T
  const void* norms;  // [2][G][6][H] of T, or null
  void* y;            // [G][rows][H]
  Dtype y_dtype;
  int gate;
  double eps;
};

struct NormTanhBackwardArguments : RowSizes {
  const void* a;            // [G][rows][H] of T
  const void* grad_y;       // likewise
  const void* grad_y_more;  // a second summand of y's gradient, or null
  const void* norms;
  void* grad_a;     // [G][rows][H]
  void* grad_norm;  // [G][blocks][2][H] of T; null without LayerNorm
  Dtype grad_a_dtype;
  int gate;
  double eps;
};

struct MixArguments : RowSizes {  // a row is (step, sample)
  int samples;                    // B
  const void* a;                  // [G][rows][H] of T: W_s's first half times f_bar
  const void* context;            // [G][B][H] of T: its second half times g_bar
  const void* norms;
  const void* f_bar;  // [G][rows][H] in dtype
  const void* g_bar;  // [G][B][H] in dtype
  Dtype dtype;
  mmixer::Mix mix;
  double eps;
  void* f_tilde;  // [G][rows][H] in dtype; forward's alone
  // The rest is backward's alone. The gradients of f_bar and g_bar here are those through Eq. 10.
  const void* grad_f_tilde;  // [G][rows][H] of T
  void* grad_a;              // [G][rows][H] in dtype
  void* grad_f_bar;          // [G][rows][H] of T; null with concat
  void* grad_g_bar;          // likewise; to be summed over the steps
  void* grad_norm;           // [G][blocks][2][H] of T; null without LayerNorm
};

struct GateArguments {
  int G, T, B, H;
  int first_step, steps;    // this launch's; a row is (weight set, step, sample)
  const void* input_gates;  // [G][T][B][3][H] of T: W f_tilde
  const void* state_gates;  // [G][steps][B][2][H] of T: W_r h, W_z h
  const void* candidate;    // [G][steps][B][H] of T: W_h (r h)
  const void* f_tilde;      // [G][T][B][H] in dtype
  const void* norms;
  void* states;    // [G][T][B][H] of T
  const void* hx;  // [G][B][H] of T, or null
  const int64_t* lengths;
  Dtype dtype;
  double eps;
  void* r_h;  // [G][steps][B][H] in dtype
  // The next state as an operand, [G][B][H] in dtype; forward's alone.
  void* operand;
  // The rest is backward's alone: x_hat and r_std, which LayerNorm's gradient needs, x_hat again as
  // an operand (null where dtype is T), and the weights' operands f_tilde + h and f_tilde + r h.
  void *x_hat, *r_std;  // [G][3][T][B][H] and [G][3][T][B], of T
  void* x_hat_operand;
  void *f_tilde_h, *f_tilde_r_h;  // [G][T][B][H] in dtype
};

struct GateBackwardArguments {
  int G, T, B, H;
  int step;           // -1: only the rest of step 0
  const void* x_hat;  // [G][3][T][B][H] of T
  const void* r_std;  // [G][3][T][B] of T
  const void* norms;
  const void* states;  // [G][T][B][H] of T
  const void* hx;
  const int64_t* lengths;
  const void* grad_output;  // [G][T][B][H] with strides, the last 1
  Strides grad_output_stride;
  Dtype grad_output_dtype, dtype;
  const void* grad_r_h;  // [G][B][H] of T: W_h^T da_h
  const void* grad_sum;  // [G][B][H] of T: W_r^T da_r + W_z^T da_z
  void* carry;           // [G][B][H] of T: the part for the state before that needs no product
  void* grad_h;          // [G][B][H] of T: of the state after this step; of hx in the end
  void* grad_gates;      // da: [G][T][B][3][H] in dtype
  void* grad_f_tilde;    // [G][T][B][H] of T
  void* grad_norm;       // [G][2][3][B][H] of T; null without LayerNorm
};

// A Problem of one weight set and one step, in the kernel's own sizes.
struct CellArguments : WeightSet {
  const void *input, *context, *hx;  // [B][F], [B][C], [B][H] or null: of dtype, with strides
  int64_t input_stride, context_stride, hx_stride;
  void* next_state;     // [B][H] of dtype
  uint64_t* workspace;  // zero before the first call with this H
  Dtype dtype, weight_dtype, norm_dtype;
  int B, F, C, H;
  int team_samples, blocks;  // per team, from cell_plan
  mmixer::Mix mix;
  double eps;
};

}  // namespace mmixer::cuda
