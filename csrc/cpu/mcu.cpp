#include "mcu.h"

#include <atomic>
#include <vector>

#include "engine.h"
#include "team.h"

namespace mmixer::cpu {
namespace {

struct InstructionSet {
  std::string name;
  const Engines* engines;
};

// Those that this build has and this processor supports, the best first.
const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#ifdef MMIXER_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
      found.push_back({"avx512", &avx512::engines});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back({"avx2", &avx2::engines});
#endif
    found.push_back({"baseline", &baseline::engines});
    return found;
  }();
  return sets;
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set = &available().front();
  return set;
}

template <class T>
const Engine<T>& engine() {
  if constexpr (sizeof(T) == 4)
    return current().load()->engines->of_float;
  else
    return current().load()->engines->of_double;
}

}  // namespace

template <class T>
int64_t saved_size(const Problem<T>& problem) {
  return engine<T>().saved_size(problem);
}

template <class T>
int64_t forward_workspace_size(const Problem<T>& problem, bool save) {
  return engine<T>().forward_workspace_size(problem, save);
}

template <class T>
int64_t backward_workspace_size(const Problem<T>& problem, bool need_weights) {
  return engine<T>().backward_workspace_size(problem, need_weights);
}

template <class T>
void forward(const Problem<T>& p, T* output, T* h_n, T* saved, T* workspace) {
  engine<T>().forward(p, Schedule(p.steps, p.batch, p.lengths), output, h_n, saved, workspace);
}

template <class T>
void backward(const Problem<T>& p, Rows<T> grad_output, Rows<T> grad_h_n, const T* saved,
              const GroupGradient<T>* gradient, T* grad_hx, T* workspace) {
  engine<T>().backward(p, Schedule(p.steps, p.batch, p.lengths), grad_output, grad_h_n, saved,
                       gradient, grad_hx, workspace);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : available()) names.push_back(set.name);
  return names;
}

std::string instruction_set() { return current().load()->name; }

bool use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : available())
    if (set.name == name) {
      current() = &set;
      return true;
    }
  return false;
}

int64_t multiply_add(int64_t rounds, int threads) {
  std::atomic<int64_t> operations{0};
  auto body = [&](Member&) { operations += current().load()->engines->multiply_add(rounds); };
  run_team(threads, body);
  return operations;
}

void read(const float* memory, int64_t size, int64_t rounds, int threads) {
  auto body = [&](Member& member) {
    const int64_t first = member.begin(size);
    current().load()->engines->read(memory + first, member.end(size) - first, rounds);
  };
  run_team(threads, body);
}

#define MMIXER_INSTANTIATE(T)                                                            \
  template int64_t saved_size(const Problem<T>&);                                        \
  template int64_t forward_workspace_size(const Problem<T>&, bool);                      \
  template int64_t backward_workspace_size(const Problem<T>&, bool);                     \
  template void forward(const Problem<T>&, T*, T*, T*, T*);                              \
  template void backward(const Problem<T>&, Rows<T>, Rows<T>, const T*,                  \
                         const GroupGradient<T>*, T*, T*);
MMIXER_INSTANTIATE(float)
MMIXER_INSTANTIATE(double)

}  // namespace mmixer::cpu
