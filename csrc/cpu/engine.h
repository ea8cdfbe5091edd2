// One instruction set's engine, as a table of functions: what engine.cpp makes and mcu.cpp picks.
#pragma once

#include "mcu.h"
#include "schedule.h"

namespace mmixer::cpu {

template <class T>
struct Engine {
  int64_t (*saved_size)(const Problem<T>&);
  int64_t (*forward_workspace_size)(const Problem<T>&, bool save);
  int64_t (*backward_workspace_size)(const Problem<T>&, bool need_weights);
  void (*forward)(const Problem<T>&, const Schedule&, T* output, T* h_n, T* saved, T* workspace);
  void (*backward)(const Problem<T>&, const Schedule&, Rows<T> grad_output, Rows<T> grad_h_n,
                   const T* saved, const GroupGradient<T>*, T* grad_hx, T* workspace);
};

struct Engines {
  Engine<float> of_float;
  Engine<double> of_double;
  int64_t (*multiply_add)(int64_t rounds);
  void (*read)(const float* memory, int64_t size, int64_t rounds);
};

namespace baseline {
extern const Engines engines;
}
#ifdef MMIXER_X86
namespace avx2 {
extern const Engines engines;
}
namespace avx512 {
extern const Engines engines;
}
#endif

}  // namespace mmixer::cpu
