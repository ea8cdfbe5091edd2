// The most that one thread of this processor can do with the engine's own vectors: the roofline to
// which benchmarks hold the engine.
#pragma once

#include "../../csrc/cpu/vector.h"

namespace mmixer::cpu::MMIXER_ISA {

#ifdef __x86_64__
#define MMIXER_IN_REGISTER(v) "+v"(v)
#else
#define MMIXER_IN_REGISTER(v) "+w"(v)
#endif

// `rounds` rounds of independent multiply-adds in registers; returns how many multiplications and
// additions these are.
inline int64_t multiply_add(int64_t rounds) {
  constexpr int chains = vector_registers == 32 ? 16 : 12;  // latency x throughput, and registers
  using V = Vector<float>;
  V sums[chains], factor = broadcast(0.999f);
#pragma GCC unroll 16
  for (int i = 0; i < chains; i++) sums[i] = broadcast(float(i));
  for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
    for (int i = 0; i < chains; i++) {
      sums[i] = sums[i] * factor + factor;
      asm volatile("" : MMIXER_IN_REGISTER(sums[i]));  // each is done, in this order
    }
  return rounds * chains * 2 * lanes<float>;
}

// Reads `size` floats `rounds` times, down to whole blocks of eight vectors.
inline void read(const float* memory, int64_t size, int64_t rounds) {
  constexpr int L = lanes<float>;
  for (int64_t round = 0; round < rounds; round++)
    for (int64_t i = 0; i + 8 * L <= size; i += 8 * L)
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        Vector<float> value = load(memory + i + j * L);
        asm volatile("" : MMIXER_IN_REGISTER(value));
      }
}

}  // namespace mmixer::cpu::MMIXER_ISA
