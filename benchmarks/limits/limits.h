// The functions that benchmarks measure beside the CPU engine, per instruction set.
#pragma once

#include "../../csrc/problem.h"

namespace mmixer::cpu {

struct Limits {
  // A team's multiply-adds in registers; returns how many multiplications and additions they were.
  int64_t (*multiply_add)(int64_t rounds, int threads);
  // A team's reading of a block of memory, each member its own part of it.
  void (*read)(const float* memory, int64_t size, int64_t rounds, int threads);
  // forward of one weight set without h_n; returns the seconds that its recurrence took.
  double (*recurrence_seconds)(const Problem& problem, const Results& results, float* workspace);
};

namespace baseline {
extern const Limits limits;
}
#ifdef MMIXER_AVX2
namespace avx2 {
extern const Limits limits;
}
#endif
#ifdef MMIXER_AVX512
namespace avx512 {
extern const Limits limits;
}
#endif

}  // namespace mmixer::cpu
