// The CUDA engine's calls: each starts kernels on the caller's stream, on the current device, and
// returns; none synchronises or allocates. A failed one throws std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "../problem.h"

namespace mmixer::cuda {

// cluster: thread block clusters exchange through shared memory (compute capability 9.0 and newer).
// cooperative: blocks exchange through L2, all of them resident at once (8.0 and newer).
// wide: as cooperative, in packets of 16 bytes instead of 8; to be measured, for H up to 512 and
// one term.
// step: no persistent kernel, but two products and two kernels per step, for any size.
enum class Path { cluster, cooperative, wide, step };

// One of the persistent kernels of a size; of path step nothing else is read.
struct Variant {
  Path path;
  int samples;       // per team: 4 or 8
  int terms;         // per float in the recurrence's products, 1 to 3
  Dtype term_dtype;  // bfloat16; forward, with one term, also float16
};

// The way in which a persistent kernel takes a size.
struct Plan {
  int H;                // padded; 0: no such kernel, or not on the current device
  int teams;            // the most that run at once
  int64_t packets;      // bytes per team, for its exchange
  std::string refusal;  // why there is no such kernel; else empty
};

// The reason why the current device cannot run this build's kernels; empty where it can.
std::string refusal();

Plan plan(const Variant& variant, int H, bool backward);

// The way in which a pass is taken, by the choice of its caller.
struct PassPlan : Variant {
  int teams;        // of a persistent kernel, at once: Plan::teams or fewer
  bool allow_tf32;  // the products of float32 operands may round these to TF32
};

// Throws std::invalid_argument for a problem that the engine does not take: dtype may be any, and
// weight_dtype and norm_dtype are the same, or bfloat16 beside float32. Groups that run in reverse
// are the last ones, so that the kernels know them by one number.
void check(const Problem& problem);

// The number of elements, of the dtype of states, that forward leaves for backward: the states, and
// with Keep::gates the prologue's activations too.
int64_t saved_size(const Problem& problem);

// The bytes of memory that each needs beside its operands.
int64_t forward_workspace_size(const Problem& problem, const PassPlan& plan);
int64_t backward_workspace_size(const Problem& problem, const PassPlan& plan, bool need_weights);

// Output and h_n may be one where T is 1 and lengths is null. saved is null where Problem::keep is
// nothing. saved and workspace begin at multiples of 64, on a GPU the workspace at one of 256.
void forward(const Problem& problem, const PassPlan& plan, const Results& results, void* saved,
             void* workspace, void* stream);

// Writes gradient [G] and, unless it is null, grad_hx [G, B, H], contiguous, in the dtypes of their
// tensors.
void backward(const Problem& problem, const PassPlan& plan, const Cotangents& cotangents,
              const void* saved, const GroupGradient* gradient, void* grad_hx, void* workspace,
              void* stream);

// The way in which a single step of the whole unit is taken in one launch.
struct CellPlan {
  int team_samples;     // 0: the current device cannot take this many samples of these sizes
  int blocks;           // per team
  int64_t workspace;    // bytes for all teams
  std::string refusal;  // why team_samples is 0; else empty
};

// The plan for a problem of one step and one weight set, of which batch, hidden, dtype,
// weight_dtype and the group's sizes are read; without context context_size is 0.
CellPlan cell_plan(const Problem& problem, const Group& group);

// The workspace belongs to the kernel between calls: calls that share it must not run at once, and
// must agree in H and in whether dtype is float64. stream_number tells streams apart, which a
// handle does not, as a later stream may have it too.
uint64_t stream_number(void* stream);
void cell(const Problem& problem, const Group& group, const CellPlan& plan, void* next_state,
          void* workspace, void* stream);

}  // namespace mmixer::cuda
