// Compiled once for each instruction set, with -DMMIXER_ISA=<name> and that set's flags.
#include "engine.h"

#include <algorithm>

#include "backward.h"
#include "limits.h"

namespace mmixer::cpu::MMIXER_ISA {
namespace {

// Threads worth their barriers: at least 32 k multiplications each in a step's product.
template <class T>
int team_size(const Problem<T>& p) {
  const int64_t work = p.groups * p.batch * p.hidden * p.hidden;
  return int(std::clamp<int64_t>(work / 32768, 1, p.threads));
}

template <class T>
int64_t saved_size(const Problem<T>& p) {
  return Saved<T>(nullptr, p).size();
}

template <class T>
int64_t forward_workspace_size(const Problem<T>& p, bool save) {
  const Saved<T> saved(nullptr, p);
  return ForwardBuffers<T>(Arena<T>(nullptr), p, save ? &saved : nullptr).arena.used();
}

template <class T>
int64_t backward_workspace_size(const Problem<T>& p, bool need_weights) {
  return BackwardMemory<T>(nullptr, nullptr, p, need_weights).size();
}

template <class T>
void forward(const Problem<T>& p, const Schedule& schedule, T* output, T* h_n, T* saved_memory,
             T* workspace) {
  const Saved<T> tables(saved_memory, p);
  const Saved<T>* saved = saved_memory ? &tables : nullptr;
  const ForwardBuffers<T> buffers(Arena<T>(workspace), p, saved);
  auto body = [&](Member& member) {
    forward_team(member, p, schedule, buffers, saved, output, h_n);
  };
  run_team(team_size(p), body);
}

template <class T>
void backward(const Problem<T>& p, const Schedule& schedule, Rows<T> grad_output, Rows<T> grad_h_n,
              const T* saved_memory, const GroupGradient<T>* gradient, T* grad_hx, T* workspace) {
  const BackwardMemory<T> memory(const_cast<T*>(saved_memory), workspace, p,
                                 gradient[0].weight_f != nullptr);
  const Backward<T> call{p,
                         schedule,
                         memory.saved,
                         *memory.buffers,
                         p.recompute ? &*memory.again : nullptr,
                         grad_output,
                         grad_h_n,
                         gradient,
                         grad_hx,
                         p.hidden};
  auto body = [&](Member& member) { backward_team(member, call); };
  run_team(team_size(p), body);
}

template <class T>
constexpr Engine<T> engine{saved_size<T>, forward_workspace_size<T>, backward_workspace_size<T>,
                           forward<T>, backward<T>};

}  // namespace

const Engines engines{engine<float>, engine<double>, multiply_add, read};

}  // namespace mmixer::cpu::MMIXER_ISA
