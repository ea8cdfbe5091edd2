// The team that a block belongs to, and the elements that a thread owns for the whole sequence, as
// forward.h and backward.h have them in common.
#pragma once

#include "arguments.h"
#include "layout.h"
#include "order.h"

namespace mmixer::cuda {

template <class L>
struct Team {
  int rank;          // this block's number in its team
  int slot;          // the team's number in this launch
  int group;         // the weight set's number
  int first_sample;  // the team's first sample in the batch
  bool reverse;      // its steps run in reverse

  template <class Arguments>
  MMIXER_DEVICE explicit Team(const Arguments& a) {
    rank = block_index() % L::C, slot = block_index() / L::C;
    const int tiles = (a.B + L::samples - 1) / L::samples, team = a.first_team + slot;
    group = team / tiles, first_sample = team % tiles * L::samples;
    reverse = group >= a.first_reverse;
  }
};

// A thread's element of each gate.
template <class L>
struct Element {
  int sample, row;             // numbers in the team and in the block
  int batch_sample, gate_row;  // numbers in the batch and in the gate
  bool exists;                 // the same for a whole warp
  bool mine;                   // neither padding of the samples nor of the rows
  OwnSteps steps;              // the sample's

  template <class Arguments>
  MMIXER_DEVICE Element(const Team<L>& team, const Arguments& a)
      : sample(thread_index() / L::rows),
        row(thread_index() % L::rows),
        batch_sample(team.first_sample + sample),
        gate_row(team.rank * L::rows + row),
        exists(L::every_warp_owns || thread_index() < L::elements),
        mine(exists && batch_sample < a.B && gate_row < a.H),
        steps(mine && a.lengths ? int(load(a.lengths + batch_sample)) : a.T, a.T, team.reverse) {}
};

// The scale and shift of a thread's row, 1 and 0 without LayerNorm and in the padding.
template <class L>
struct Norms {
  float gamma[step_gates], beta[step_gates];

  MMIXER_DEVICE Norms(const NormTable& norms, int G, int group, int H, int row) {
    const bool exists = norms.p && row < H;
    const int rows = norm_rows(norms.has_context);
    MMIXER_UNROLL
    for (int gate = 0; gate < step_gates; gate++) {
      const float* p = static_cast<const float*>(norms.p) +
                       (int64_t(group) * rows + norm_row(gate_r + gate, norms.has_context)) * H +
                       row;
      gamma[gate] = exists ? load(p) : 1;
      beta[gate] = exists ? load(p + int64_t(G) * rows * H) : 0;
    }
  }

  MMIXER_DEVICE float apply(int gate, float x) const { return x * gamma[gate] + beta[gate]; }
};

}  // namespace mmixer::cuda
