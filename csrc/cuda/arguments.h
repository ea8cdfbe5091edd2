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

// LayerNorm's weights and biases, [2][G][norm_rows][H] of T; p is null without LayerNorm.
struct NormTable {
  const void* p;
  bool has_context;
};

// Tables with T are in the order in which a group's steps run (order.h), if nothing else is said.
// The groups from number first_reverse on run in reverse; it is G where none does.

struct ForwardArguments {
  const uint16_t* weights;   // [G][terms][3][Hp][Hp], Hp the padded hidden size
  const float* input_gates;  // [G][T][B][3][H]: W f_tilde
  NormTable norms;
  const float* hx;         // [G][B][H] or null: zeros
  const int64_t* lengths;  // [B] or null
  int first_reverse;
  // In float32 with several terms per float, else in the terms' dtype.
  void* output;  // [G][T][B][H] with strides, in the caller's order; zeros past a sample's length
  Strides output_stride;
  void* h_n;      // [G][B][H]
  float* states;  // [G][T][B][H], which stay past a sample's length; null: not kept
  void* packets;  // Plan::packets bytes per team that exchanges through L2
  int G, T, B, H;
  int first_team;  // teams are numbered through G, then tiles of a team's samples
  float eps;
};

struct BackwardArguments {
  const uint16_t* weights;  // [G][terms][3][Hp][Hp], transposed
  const float* x_hat;       // [G][3][T][B][H]
  const float* projected;   // V: like x_hat; null without LayerNorm
  const float* r_std;       // [G][3][T][B]
  NormTable norms;
  const float* states;  // [G][T][B][H]
  const float* hx;      // [G][B][H] or null
  const int64_t* lengths;
  int first_reverse;
  const void* grad_output;  // [G][T][B][H] in dtype with strides, in the caller's order
  Strides grad_output_stride;
  const void* grad_h_n;  // [G][B][H] in dtype with strides
  int64_t grad_h_n_stride_group, grad_h_n_stride_sample;
  void* grad_gates;     // da: [G][3][T][B][H] in dtype
  float* grad_f_tilde;  // [G][T][B][H]
  void* grad_hx;        // [G][B][H] in dtype
  float* grad_norm;     // [G][2][3][B][H]: of norm_weight, norm_bias; a sum per sample; or null
  void* packets;
  Dtype dtype;
  int G, T, B, H;
  int first_team;
};

// A table of rows that is copied, in another dtype: [tables][rows][columns].
struct Copy {
  const void* source;  // null: zeros
  void* target;
  int64_t tables, rows, columns;
  int64_t source_stride_table, source_stride_row;  // in elements
  int64_t target_stride_table, target_stride_row;
  const int64_t* lengths;  // [rows]: zeros in the tables from there on; null: none
  Dtype source_dtype, target_dtype;
  int end;  // the number of the first block behind this copy's, among those of all copies
};

constexpr int copied_columns = 256;  // of a row, by a warp at a time

template <int most>
struct Copies {
  int copies;
  Copy copy[most];  // per launch
};

constexpr int most_weight_sets = 8;  // per launch

struct PrepareArguments : Copies<32> {
  // This launch's sets, of which W_r, W_z and W_h and the norms are read.
  const void* weight[most_weight_sets][step_gates];
  const void* norm[most_weight_sets][2];
  int first, count;  // the number of the first set among all G, and the number of sets
  Dtype weight_dtype, norm_dtype;
  bool remove_mean, transposed;
  void* matrices;  // [G][3][H][H] in matrices_dtype
  Dtype matrices_dtype;
  // [G][terms][3][Hp][Hp] in term_dtype, 16-byte aligned, or null: `terms` bfloat16 terms per
  // weight, or the weight in float16 and terms = 1. Hp is a multiple of 8.
  uint16_t* split_weights;
  Dtype term_dtype;
  void* norms;  // NormTable's memory, or null
  bool has_context;
  int G, H, Hp, terms;
};

// The end of a backward: the weights' gradients from what the kernels and products left.
struct FinishArguments : Copies<24> {
  // This launch's sets: the gradients of W_g, W_s (of which the f half is there), W_r, W_z and W_h
  // in weight_dtype, and of the norms in norm_dtype. Without context
  // what is said of W_g and W_s is not there.
  void *weight_g[most_weight_sets], *weight_s[most_weight_sets];
  const void* context[most_weight_sets];  // [B][context_size] in `operand`, with strides
  int64_t context_stride[most_weight_sets], context_size[most_weight_sets];
  int most_context_size;
  const void* grad_a_g;      // [G][B][H] in `operand`
  const void* grad_a_s_sum;  // [G][B][H] of T
  const void* g_bar;         // [G][B][H] in `operand`
  void* weight[most_weight_sets][step_gates];
  void* norm[most_weight_sets][2];
  int first, count;
  Dtype weight_dtype, norm_dtype;
  const void* matrices;  // [G][3][H][H] of T
  bool remove_mean;      // over the rows of each column
  // The summands of the norms' gradients, of T; null without: [G][n][2][H] of f, g and s, and
  // [G][2][3][n][H] of r, z and h.
  const void* prologue[gate_r];
  int prologue_summands[gate_r];
  const void* recurrence;
  int recurrence_summands;
  bool has_context;
  int G, B, H;
  Dtype operand, dtype;  // of products' operands, and T
};

struct StepSumArguments {
  int G, T, B, H;
  const void* grad_a;      // [G][T][B][H] in dtype, in any order of the steps
  const void* grad_g_bar;  // [G][T][B][H] of T, or null
  Dtype dtype;
  void *grad_a_sum, *grad_g_bar_sum;  // [G][B][H] of T: over the steps
};

// G weight sets have `rows` rows each, which `blocks` blocks share, at most as many as rows. A row
// is (step, sample), in the caller's order, or a sample. One table has the order of the run: that
// of f_tilde, or of its gradient.
struct RowSizes {
  int rows, blocks;
  int samples;        // B
  int first_reverse;  // G also where no table has another order
};

// The rows of one gate.
struct NormTanhRows : RowSizes {
  int gate;
  const void* a;  // [G][rows][H] of T
  void* y;        // [rows][H] in dtype of each weight set, in the order of the run
  int64_t y_stride_group;
};

struct NormTanhArguments {
  NormTanhRows part[2];
  NormTable norms;
  Dtype dtype;
  int G, H;
  double eps;
};

struct NormTanhBackwardRows : RowSizes {
  int gate;
  const void* a;            // [G][rows][H] of T
  const void* grad_y;       // likewise, in the order of the run
  const void* grad_y_more;  // a second summand of y's gradient, or null
  void* grad_a;             // [G][rows][H] in dtype
  void* grad_norm;          // [G][blocks][2][H] of T; null without LayerNorm
};

struct NormTanhBackwardArguments {
  NormTanhBackwardRows part[2];
  NormTable norms;
  Dtype dtype;
  int G, H;
  double eps;
};

struct MixArguments : RowSizes {
  int G, H;
  const void* a;        // [G][rows][H] of T: W_s's first half times f_bar
  const void* context;  // [G][B][H] of T: its second half times g_bar
  NormTable norms;
  const void* f_bar;  // [G][rows][H] in dtype
  const void* g_bar;  // [G][B][H] in dtype
  Dtype dtype;
  mmixer::Mix mix;
  double eps;
  // forward's alone
  void* f_tilde;  // [rows][H] in dtype of each weight set, in the order of the run
  int64_t f_tilde_stride_group;
  // The rest is backward's alone. The gradients of f_bar and g_bar here are those through Eq. 10.
  const void* grad_f_tilde;  // [G][rows][H] of T, in the order of the run
  void* grad_a;              // [G][rows][H] in dtype
  void* grad_f_bar;          // [G][rows][H] of T; null with concat
  void* grad_g_bar;          // likewise; to be summed over the steps
  void* grad_norm;           // [G][blocks][2][H] of T; null without LayerNorm
};

// A row for each (step, sample) of a launch and each weight set.
struct Rows {
  const void* p;
  int64_t stride_group, stride_row;
};

struct GateArguments {
  int G, T, B, H;
  int first_step, steps;   // this launch's; a row is (weight set, step, sample)
  Rows input[step_gates];  // of T: W f_tilde
  Rows state[step_gates];  // of T: W_r h, W_z h, W_h (r h)
  NormTable norms;
  void* states;  // of T; a stride of 0 per step: the last one alone
  Strides states_stride;
  const void* hx;  // [G][B][H] of T, or null
  const int64_t* lengths;
  Dtype dtype;
  double eps;
  void* r_h;  // [steps][B][H] in dtype of each weight set
  int64_t r_h_stride_group;
  // forward's alone
  void* operand;  // the next state as an operand: [G][B][H] in dtype
  int first_reverse;
  void* output;  // [G][T][B][H] in dtype with strides, in the caller's order; zeros past a length
  Strides output_stride;
  void* h_n;  // [G][B][H] in dtype
  // The rest is backward's alone: x_hat and r_std, which LayerNorm's gradient needs, x_hat again as
  // an operand (null where dtype is T), and the weights' operands f_tilde + h, again, and
  // f_tilde + r h, where they are wanted.
  Rows f_tilde;         // in dtype
  void *x_hat, *r_std;  // [G][3][T][B][H] and [G][3][T][B], of T
  void* x_hat_operand;
  void* weight_operands;  // [G][3][T][B][H] in dtype, or null
};

struct GateBackwardArguments {
  int G, T, B, H;
  int step;           // -1: only the rest of step 0
  const void* x_hat;  // [G][3][T][B][H] of T
  const void* r_std;  // [G][3][T][B] of T
  NormTable norms;
  const void* states;  // [G][T][B][H] of T
  const void* hx;
  const int64_t* lengths;
  int first_reverse;
  const void* grad_output;  // [G][T][B][H] in dtype with strides, in the caller's order
  Strides grad_output_stride;
  Dtype dtype;
  const void* grad_r_h;  // [G][B][H] of T: W_h^T da_h
  const void* grad_sum;  // [G][B][H] of T: W_r^T da_r + W_z^T da_z
  void* carry;           // [G][B][H] of T: the part for the state before that needs no product
  void* grad_h;          // [G][B][H] of T: of the state after this step; h_n's at first
  void* grad_hx;         // [G][B][H] in dtype
  void* grad_gates;      // da: [G][3][T][B][H] in dtype
  void* operand;         // da of this step: [G][B][3][H] in dtype
  void* grad_f_tilde;    // [G][T][B][H] of T
  void* grad_norm;       // [G][2][3][B][H] of T; null without LayerNorm
};

// A Problem of one weight set and one step, in the kernel's own sizes.
struct CellArguments : WeightSet {
  // [B][F], [B][C] or null without context, [B][H] or null for zeros: of dtype, with strides
  const void *input, *context, *hx;
  int64_t input_stride, context_stride, hx_stride;
  void* next_state;     // [B][H] of dtype
  uint64_t* workspace;  // zero before the first call with this H
  Dtype dtype, weight_dtype, norm_dtype;
  int B, F, C, H;            // C = 0 without context
  int team_samples, blocks;  // per team, from cell_plan
  mmixer::Mix mix;
  double eps;
};

}  // namespace mmixer::cuda
