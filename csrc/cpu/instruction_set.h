// One instruction set's engines, as tables of functions, which instruction_set.cpp makes and
// engine.cpp picks from.
#pragma once

#include "engine.h"
#include "schedule.h"

namespace mmixer::cpu {

struct Engine {
  int64_t (*saved_size)(const Problem&);
  int64_t (*forward_workspace_size)(const Problem&);
  int64_t (*backward_workspace_size)(const Problem&, bool need_weights);
  int64_t (*packed_size)(const Problem&);
  void (*pack)(const Problem&, void* packed);
  void (*context_share)(const Problem&, const Schedule&, void* share, void* workspace);
  void (*forward)(const Problem&, const Schedule&, const Results&, void* saved, void* workspace);
  void (*backward)(const Problem&, const Schedule&, const Cotangents&, const void* saved,
                   const GroupGradient*, void* grad_hx, void* workspace);
};

struct Engines {
  Engine of_float, of_double;
};

namespace baseline {
extern const Engines engines;
}
#ifdef MMIXER_AVX2
namespace avx2 {
extern const Engines engines;
}
#endif
#ifdef MMIXER_AVX512
namespace avx512 {
extern const Engines engines;
}
#endif

}  // namespace mmixer::cpu
