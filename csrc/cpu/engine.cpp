#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#ifdef MMIXER_INT8_AVXVNNI
#include <cpuid.h>
#endif

#include "instruction_set.h"
#include "int8.h"

namespace mmixer::cpu {

namespace baseline {
extern const Int8Kernels int8_kernels;
}
#ifdef MMIXER_INT8_AVX2
namespace avx2 {
extern const Int8Kernels int8_kernels;
}
#endif
#ifdef MMIXER_INT8_AVXVNNI
namespace avxvnni {
extern const Int8Kernels int8_kernels;
}
#endif
#ifdef MMIXER_INT8_AVX512VNNI
namespace avx512vnni {
extern const Int8Kernels int8_kernels;
}
#endif

namespace {

struct InstructionSet {
  std::string name;
  const Engines* engines;
  const Int8Set* int8;
};

#ifdef MMIXER_INT8_AVXVNNI
// Clang 14's __builtin_cpu_supports does not know it.
bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

// The first of these names that is there.
const Int8Set* best_int8(std::initializer_list<const char*> names) {
  for (const char* name : names)
    for (const Int8Set& set : int8_sets())
      if (set.name == name) return &set;
  return nullptr;
}

// The sets that this build has and this processor supports, the best first.
const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#ifdef MMIXER_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
      found.push_back({"avx512", &avx512::engines, best_int8({"avx512vnni", "avxvnni", "avx2"})});
#endif
#ifdef MMIXER_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back({"avx2", &avx2::engines, best_int8({"avxvnni", "avx2"})});
#endif
    found.push_back({"baseline", &baseline::engines, best_int8({"baseline"})});
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
  const bool is_int8 = p.weight_dtype == Dtype::int8;
  for (const Dtype stored : {is_int8 ? p.norm_dtype : p.weight_dtype, p.norm_dtype})
    require(stored == p.dtype || (stored == Dtype::bfloat16 && p.dtype == Dtype::float32),
            "weight_dtype and norm_dtype must be dtype, or bfloat16 where that is float32, or "
            "weight_dtype int8 for a float32 step");
  require(!is_int8 || (p.dtype == Dtype::float32 && p.steps == 1 && p.keep == Keep::nothing),
          "weight_dtype can be int8 for a single float32 step that keeps nothing alone");
  const Engines& engines = *current().load()->engines;
  return p.dtype == Dtype::float64 ? engines.of_double : engines.of_float;
}

// The engine of a problem whose groups are there too.
const Engine& engine_with_groups(const Problem& p) {
  const Engine& found = engine(p);
  for (int64_t g = 0; g < p.groups; g++)
    require(p.group[g].input_size > 0 && (!p.has_context || p.group[g].context_size > 0),
            "input_size and context_size must be positive");
  for (int64_t g = 0; g < p.groups && p.weight_dtype == Dtype::int8; g++) {
    require(p.group[g].scale, "scale must be there with int8 weights");
    require(std::max({p.group[g].input_size, p.group[g].context_size, p.hidden}) <= int8_columns,
            "input_size, context_size and hidden must be at most 132104 with int8 weights");
  }
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
  require(p.groups == 1 && p.weight_dtype != Dtype::int8,
          "groups must be 1, and weight_dtype not int8, for weights to be packed");
  return found.packed_size(p);
}

void pack(const Problem& p, void* packed) {
  const Engine* const packer = &engine_with_groups(p);
  packed_size(p);  // throws where there are no such
  require(!p.packed, "packed must be null where weights are to be packed");
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

const std::vector<Int8Set>& int8_sets() {
  static const std::vector<Int8Set> sets = [] {
    std::vector<Int8Set> found;
#ifdef MMIXER_INT8_AVX2
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef MMIXER_INT8_AVX512VNNI
    if (has_avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
      found.push_back({"avx512vnni", &avx512vnni::int8_kernels});
#endif
#ifdef MMIXER_INT8_AVXVNNI
    if (has_avx2 && has_avxvnni()) found.push_back({"avxvnni", &avxvnni::int8_kernels});
#endif
    if (has_avx2) found.push_back({"avx2", &avx2::int8_kernels});
#endif
    found.push_back({"baseline", &baseline::int8_kernels});
    return found;
  }();
  return sets;
}

const Int8Kernels& int8_in_use() { return *current().load()->int8->kernels; }

std::string int8_set() { return current().load()->int8->name; }

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
