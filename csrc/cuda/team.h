// What forward.h and backward.h have in common: the team that a block belongs to, and the elements that
// a thread owns for the whole sequence.
#pragma once

#include "arguments.h"
#include "layout.h"

namespace mmixer::cuda {

template <class L>
struct Team {
  int rank;          // of this block in its team
  int slot;          // of the team in this launch
  int group;         // the weight set
  int first_sample;  // of the batch

  template <class Arguments>
  MMIXER_DEVICE explicit Team(const Arguments& a) {
    rank = block_index() % L::C, slot = block_index() / L::C;
    const int tiles = (a.B + L::samples - 1) / L::samples, team = a.first_team + slot;
    group = team / tiles, first_sample = team % tiles * L::samples;
  }
};

// Places in the whole batch and the whole gate.
template <class L>
struct Elements {
  int row[L::per_thread], sample[L::per_thread], length[L::per_thread];
  bool mine[L::per_thread];  // neither padding of the samples nor of the rows

  template <class Arguments>
  MMIXER_DEVICE Elements(const Team<L>& team, const Arguments& a) {
    MMIXER_UNROLL
    for (int j = 0; j < L::per_thread; j++) {
      const Element<L> element(j);
      row[j] = team.rank * L::rows + element.row, sample[j] = team.first_sample + element.sample;
      mine[j] = element.exists && row[j] < a.H && sample[j] < a.B;
      length[j] = mine[j] && a.lengths ? int(load(a.lengths + sample[j])) : a.T;
    }
  }
};

}  // namespace mmixer::cuda
