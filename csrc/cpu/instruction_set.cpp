// This file is compiled once per instruction set, with -DMMIXER_ISA=<name> and that set's flags.
#include "instruction_set.h"

#include "backward.h"

namespace mmixer::cpu::MMIXER_ISA {
namespace {

template <class T>
int64_t saved_size(const Problem& p) {
  return Saved<T>(nullptr, p).size();
}

template <class T>
int64_t forward_workspace_size(const Problem& p) {
  return ForwardBuffers<T>(Arena<T>(nullptr), p, Saved<T>(nullptr, p)).arena.used();
}

template <class T>
int64_t backward_workspace_size(const Problem& p, bool need_weights) {
  return BackwardMemory<T>(nullptr, nullptr, p, need_weights).size();
}

template <class T>
void forward(const Problem& p, const Schedule& schedule, const Results& results, void* saved_memory,
             void* workspace) {
  const Saved<T> saved(static_cast<T*>(saved_memory), p);
  const ForwardBuffers<T> buffers(Arena<T>(static_cast<T*>(workspace)), p, saved);
  auto body = [&](Member& member) { forward_team(member, p, schedule, buffers, saved, results); };
  run_team(team_size(p), body);
}

template <class T>
void backward(const Problem& p, const Schedule& schedule, const Cotangents& cotangents,
              const void* saved_memory, const GroupGradient* gradient, void* grad_hx,
              void* workspace) {
  const BackwardMemory<T> memory(const_cast<T*>(static_cast<const T*>(saved_memory)),
                                 static_cast<T*>(workspace), p, gradient[0].weight[0] != nullptr);
  const Backward<T> call{p,
                         schedule,
                         memory.saved,
                         *memory.buffers,
                         memory.again ? &*memory.again : nullptr,
                         cotangents,
                         gradient,
                         static_cast<T*>(grad_hx)};
  auto body = [&](Member& member) { call.run(member); };
  run_team(team_size(p), body);
}

template <class T>
constexpr Engine engine{saved_size<T>, forward_workspace_size<T>, backward_workspace_size<T>,
                        forward<T>, backward<T>};

}  // namespace

const Engines engines{engine<float>, engine<double>};

}  // namespace mmixer::cpu::MMIXER_ISA
