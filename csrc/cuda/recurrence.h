// The persistent kernels of the recurrence, by path and size, behind plain functions.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "launch.h"

namespace mmixer::cuda {

// One kernel, for hidden sizes up to H.
template <class Arguments>
struct Recurrence {
  int H, terms, samples;
  Dtype term_dtype;
  int64_t packets;  // bytes per team
  Resident (*resident_teams)();
  // Starts teams first_team ... first_team + teams - 1. arguments.packets has `packets` bytes per
  // team, all zero.
  void (*launch)(const Arguments& arguments, int teams, void* stream);
};

template <class Arguments>
using Recurrences = const std::vector<Recurrence<Arguments>>&;

Recurrences<ForwardArguments> cluster_forward();
Recurrences<ForwardArguments> cooperative_forward();
Recurrences<ForwardArguments> wide_forward();
Recurrences<BackwardArguments> cluster_backward();
Recurrences<BackwardArguments> cooperative_backward();
Recurrences<BackwardArguments> wide_backward();

}  // namespace mmixer::cuda
