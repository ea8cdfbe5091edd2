#include "engine.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "instruction_set.h"

namespace mmixer::cpu {
namespace {

struct InstructionSet {
  std::string name;
  const Engines* engines;
};

// The sets that this build has and this processor supports, the best first.
const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#ifdef MMIXER_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
      found.push_back({"avx512", &avx512::engines});
#endif
#ifdef MMIXER_AVX2
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

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// The engine of a problem's dtype.
const Engine& engine(const Problem& p) {
  require(p.groups > 0 && p.steps > 0 && p.batch > 0 && p.hidden > 0,
          "groups, steps, batch and hidden must be positive");
  require(p.dtype == Dtype::float32 || p.dtype == Dtype::float64,
          "dtype must be float32 or float64");
  for (const Dtype stored : {p.weight_dtype, p.norm_dtype})
    require(stored == p.dtype || (stored == Dtype::bfloat16 && p.dtype == Dtype::float32),
            "weight_dtype and norm_dtype must be dtype, or bfloat16 where that is float32");
  const Engines& engines = *current().load()->engines;
  return p.dtype == Dtype::float64 ? engines.of_double : engines.of_float;
}

// The engine of a problem whose groups are there too.
const Engine& engine_with_groups(const Problem& p) {
  const Engine& found = engine(p);
  for (int64_t g = 0; g < p.groups; g++)
    require(p.group[g].input_size > 0 && (!p.has_context || p.group[g].context_size > 0),
            "input_size and context_size must be positive");
  for (int64_t g = 0; g < p.groups; g++)
    require(!p.group[g].share == !p.group[0].share &&
                (!p.group[g].share || (p.has_context && p.keep == Keep::nothing)),
            "a context's share must be of all groups, with a context, where nothing is kept");
  if (p.packed) {
    require(p.groups == 1, "groups must be 1 where weights are packed");
    const Engine* packer;
    std::memcpy(&packer, p.packed, sizeof packer);
    require(packer == &found, "packed must be of this dtype and of the instruction set in use");
  }
  for (int64_t b = 0; p.lengths && b < p.batch; b++)
    require(p.lengths[b] >= 1 && p.lengths[b] <= p.steps, "lengths must be in 1..T");
  return found;
}

}  // namespace

void check(const Problem& p) { engine_with_groups(p); }

int64_t saved_size(const Problem& p) { return engine_with_groups(p).saved_size(p); }

int64_t forward_workspace_size(const Problem& p) {
  return engine_with_groups(p).forward_workspace_size(p);
}

int64_t backward_workspace_size(const Problem& p, bool need_weights) {
  return engine_with_groups(p).backward_workspace_size(p, need_weights);
}

int64_t packed_size(const Problem& p) {
  const Engine& found = engine_with_groups(p);
  require(p.groups == 1, "groups must be 1 for weights to be packed");
  return found.packed_size(p);
}

void pack(const Problem& p, void* packed) {
  const Engine* const packer = &engine_with_groups(p);
  require(p.groups == 1 && !p.packed,
          "groups must be 1, and packed null, for weights to be packed");
  packer->pack(p, packed);
  std::memcpy(packed, &packer, sizeof packer);
}

void context_share(const Problem& p, void* share, void* workspace) {
  const Engine& found = engine_with_groups(p);
  require(p.has_context && !p.group[0].share && p.keep == Keep::nothing,
          "a context's share must be computed with a context, without one, and nothing be kept");
  found.context_share(p, Schedule(p.steps, p.batch, nullptr), share, workspace);
}

void forward(const Problem& p, const Results& results, void* saved, void* workspace) {
  engine_with_groups(p).forward(p, Schedule(p.steps, p.batch, p.lengths), results, saved,
                                workspace);
}

void backward(const Problem& p, const Cotangents& cotangents, const void* saved,
              const GroupGradient* gradient, void* grad_hx, void* workspace) {
  engine_with_groups(p).backward(p, Schedule(p.steps, p.batch, p.lengths), cotangents, saved,
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

}  // namespace mmixer::cpu
