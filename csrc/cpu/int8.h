// Products of int8 weights with rows that are quantised as they come, for single steps.
//
// A row x of K values becomes q[k] = round(x[k] * (127 / max |x|)), to the nearest and halves to
// even, and scale = max |x| / 127; of a row of zeros, or of a largest value below 4e-37, all q are
// 0. NaN and infinity make every result of their row NaN. A weight w stands for
// weight_scale[n] * w[n][k]. Then
//
//   c[n] = (weight_scale[n] * scale) * sum_k w[n][k] q[k],
//
// whose sum is an exact integer: results have equal bits with every instruction set, for every
// number of threads and rows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmixer::cpu {

// The largest K whose sums of 127 * 128 fit in 32 bits.
constexpr int64_t int8_columns = 132104;

// The head of a quantised row. The values begin a cache line after it; they take whole lines, and
// one more for the last ones.
struct QuantizedRow {
  float scale;
  int32_t sum;  // of the values
};
constexpr int64_t int8_row_bytes(int64_t K) { return (K + 63) / 64 * 64 + 128; }

// One instruction set's functions; `product` reads what `quantize` of the same set has written.
struct Int8Kernels {
  // Writes int8_row_bytes(K).
  void (*quantize)(const float* row, int64_t K, void* quantized);
  // Writes c[m][n] for M quantised rows and the rows [n, n_end) of w, which lie w_stride apart.
  void (*product)(const void* const* rows, int64_t M, const int8_t* w, int64_t w_stride, int64_t K,
                  const float* weight_scale, int64_t n, int64_t n_end, float* const* c);
};

struct Int8Set {
  std::string name;
  const Int8Kernels* kernels;
};

// The sets among "avx512vnni", "avxvnni", "avx2" and "baseline" that this build and this processor
// have, the best first.
const std::vector<Int8Set>& int8_sets();
// The best of them that belongs to the engine's instruction set in use, and its name.
const Int8Kernels& int8_in_use();
std::string int8_set();

}  // namespace mmixer::cpu
