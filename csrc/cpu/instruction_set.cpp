// This file is compiled once per instruction set, with -DMMIXER_ISA=<name> and that set's flags.
#include "instruction_set.h"

#include "backward.h"

namespace mmixer::cpu::MMIXER_ISA {
namespace {

template <class T>
int64_t saved_size(const Problem& p) {
  return Saved<T>(nullptr, p).size();
}

// Calls body(part, group) for the groups that are computed at once, from the first on.
template <class T, class Body>
void each_part(const Problem& p, const Body& body) {
  const int64_t count = groups_at_once(p);
  for (int64_t group = 0; group < p.groups; group += count) body(from_group<T>(p, group), group);
}

template <class T>
int64_t forward_workspace_size(const Problem& p) {
  int64_t most = 0;
  each_part<T>(p, [&](const Problem& part, int64_t) {
    const ForwardBuffers<T> buffers(Arena<T>(nullptr), part, Saved<T>(nullptr, part));
    most = std::max(most, buffers.arena.used());
  });
  return most;
}

template <class T>
int64_t backward_workspace_size(const Problem& p, bool need_weights) {
  int64_t most = 0;
  each_part<T>(p, [&](const Problem& part, int64_t) {
    const BackwardMemory<T> memory(Saved<T>(nullptr, part), nullptr, part, need_weights);
    most = std::max(most, memory.size());
  });
  return most;
}

template <class T>
int64_t packed_size(const Problem& p) {
  return Packed<T>(nullptr, p).arena.used();
}

template <class T>
void pack(const Problem& p, void* memory) {
  const Packed<T> packed(static_cast<T*>(memory), p);
  auto body = [&](Member& member) {
    pack_mix(member, p, packed);
    pack_recurrence(member, p, packed);
  };
  run_team(team_size(p), body);
}

template <class T>
void context_share(const Problem& p, const Schedule& schedule, void* share, void* workspace) {
  each_part<T>(p, [&](const Problem& part, int64_t group) {
    const ForwardBuffers<T> buffers(Arena<T>(static_cast<T*>(workspace)), part,
                                    Saved<T>(nullptr, part));
    T* own = static_cast<T*>(share) + group * 2 * p.batch * p.hidden;
    auto body = [&](Member& member) { context_share_team(member, part, schedule, buffers, own); };
    run_team(team_size(part), body);
  });
}

template <class T>
void forward(const Problem& p, const Schedule& schedule, const Results& results, void* saved_memory,
             void* workspace) {
  const Saved<T> all_saved(static_cast<T*>(saved_memory), p);
  each_part<T>(p, [&](const Problem& part, int64_t group) {
    const Saved<T> saved = all_saved.from(group);
    const ForwardBuffers<T> buffers(Arena<T>(static_cast<T*>(workspace)), part, saved);
    Results own = results;
    own.output = static_cast<T*>(results.output) + group * results.output_stride_group;
    own.h_n = static_cast<T*>(results.h_n) + group * p.batch * p.hidden;
    auto body = [&](Member& member) { forward_team(member, part, schedule, buffers, saved, own); };
    run_team(team_size(part), body);
  });
}

template <class T>
void backward(const Problem& p, const Schedule& schedule, const Cotangents& cotangents,
              const void* saved_memory, const GroupGradient* gradient, void* grad_hx,
              void* workspace) {
  const Saved<T> saved(const_cast<T*>(static_cast<const T*>(saved_memory)), p);
  each_part<T>(p, [&](const Problem& part, int64_t group) {
    const BackwardMemory<T> memory(saved.from(group), static_cast<T*>(workspace), part,
                                   gradient[0].weight[0] != nullptr);
    Cotangents own = cotangents;
    if (own.grad_output)
      own.grad_output =
          static_cast<const T*>(own.grad_output) + group * own.grad_output_stride_group;
    if (own.grad_h_n)
      own.grad_h_n = static_cast<const T*>(own.grad_h_n) + group * own.grad_h_n_stride_group;
    const Backward<T> call{part,
                           schedule,
                           memory.saved,
                           *memory.buffers,
                           memory.again ? &*memory.again : nullptr,
                           own,
                           gradient + group,
                           grad_hx ? static_cast<T*>(grad_hx) + group * p.batch * p.hidden
                                   : nullptr};
    auto body = [&](Member& member) { call.run(member); };
    run_team(team_size(part), body);
  });
}

template <class T>
constexpr Engine engine{saved_size<T>,
                        forward_workspace_size<T>,
                        backward_workspace_size<T>,
                        packed_size<T>,
                        pack<T>,
                        context_share<T>,
                        forward<T>,
                        backward<T>};

}  // namespace

const Engines engines{engine<float>, engine<double>};

}  // namespace mmixer::cpu::MMIXER_ISA
