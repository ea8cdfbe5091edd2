// C = A W^T, the one matrix product of the engine: both operands are read along k, as PyTorch stores
// them, so that weights need no packing.
//
// A member owns a range of rows of A, or of columns of C where there are few rows. A tile of MR x NR
// sums stays in registers; rows of A are taken in blocks that stay in L1 while W streams past once a
// block. Bound: FMA throughput for blocks of 8 rows and more, the bandwidth of W below.
//
// Each element of C is summed in an order that depends on K alone, lane by lane and then across
// lanes: not on the tile, the thread or the number of rows.
#pragma once

#include <algorithm>

#include "team.h"
#include "vector.h"

namespace mmixer::cpu::MMIXER_ISA {

constexpr int tile_rows = 4;
constexpr int64_t block_rows = 12;

// Columns of a tile of MR rows, so that sums and one operand fill the registers.
constexpr int tile_columns(int mr) {
  if (vector_registers == 32) return mr == 1 ? 8 : 6;
  return mr == 1 ? 8 : mr == 2 ? 5 : mr == 3 ? 4 : 3;
}

// Kept out of its callers, whose live values would push the sums out of the registers.
template <class T, int MR, int NR>
__attribute__((noinline)) void gemm_tile(const T* const* a, const T* w, int64_t w_stride, int64_t K, T* const* c,
                      int64_t n, bool accumulate) {
  using V = Vector<T>;
  constexpr int L = lanes<T>;
  V sums[MR][NR] = {};
  auto add = [&](auto load_at) __attribute__((always_inline)) {
    V columns[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) columns[j] = load_at(w + j * w_stride);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const V row = load_at(a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) sums[i][j] += row * columns[j];
    }
  };
  int64_t k = 0;
  for (; k + L <= K; k += L) add([k](const T* p) { return load(p + k); });
  if (k < K) {
    // The last, partial vector ends with the row: what it repeats is masked in both operands.
    if (K >= L)
      add([k, K](const T* p) { return keep_from<T>(load(p + K - L), int(L - (K - k))); });
    else
      add([K](const T* p) { return load(p, K); });
  }
  T total[MR * NR];
  constexpr int in_fours = MR * NR / 4 * 4;
#pragma GCC unroll 8
  for (int i = 0; i < in_fours; i += 4) sum_four<T>(&sums[0][0] + i, total + i);
#pragma GCC unroll 8
  for (int i = in_fours; i < MR * NR; i++) total[i] = sum<T>((&sums[0][0])[i]);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++)
      c[i][n + j] = accumulate ? c[i][n + j] + total[i * NR + j] : total[i * NR + j];
}

template <class T, int MR, int NR>
inline void gemm_columns(const T* const* a, const T* w, int64_t w_stride, int64_t K, T* const* c,
                         int64_t n, int64_t n_end, bool accumulate) {
  for (; n + NR <= n_end; n += NR)
    gemm_tile<T, MR, NR>(a, w + n * w_stride, w_stride, K, c, n, accumulate);
  if constexpr (NR > 1)
    if (n < n_end) gemm_columns<T, MR, NR / 2>(a, w, w_stride, K, c, n, n_end, accumulate);
}

// c(m)[n] (+)= sum_k a(m)[k] w[n * w_stride + k] for m < M, n < N; a and c give the rows' addresses.
template <class T, class RowsA, class RowsC>
void gemm(const Member& member, RowsA a, int64_t M, const T* w, int64_t w_stride, int64_t N,
          int64_t K, RowsC c, bool accumulate = false) {
  int64_t m = 0, m_end = M, n = 0, n_end = N;
  const int64_t blocks = (M + block_rows - 1) / block_rows;
  if (blocks >= 2 * member.size()) {
    m = member.begin(blocks) * block_rows;
    m_end = std::min(M, member.end(blocks) * block_rows);
  } else {
    n = member.begin(N);
    n_end = member.end(N);
  }
  constexpr int64_t panel = 24;  // columns of W that stay in L1 while a block of rows passes
  for (; m < m_end; m += block_rows) {
    const int64_t rows = std::min(block_rows, m_end - m);
    const T* a_rows[block_rows];
    T* c_rows[block_rows];
    for (int64_t i = 0; i < rows; i++) a_rows[i] = a(m + i), c_rows[i] = c(m + i);
    for (int64_t first = n; first < n_end; first += panel) {
      const int64_t last = std::min(first + panel, n_end);
      for (int64_t i = 0; i < rows; i += tile_rows) {
        auto tiles = [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          gemm_columns<T, MR, tile_columns(MR)>(a_rows + i, w, w_stride, K, c_rows + i, first, last,
                                                accumulate);
        };
        switch (std::min<int64_t>(tile_rows, rows - i)) {
          case 4: tiles(std::integral_constant<int, 4>{}); break;
          case 3: tiles(std::integral_constant<int, 3>{}); break;
          case 2: tiles(std::integral_constant<int, 2>{}); break;
          default: tiles(std::integral_constant<int, 1>{});
        }
      }
    }
  }
}

// target[j * target_stride + i] = element (i, j) for i < M, j < N, where source(i, j) is the vector of
// elements from j on; a member takes a range of columns.
template <class T, class Source>
void transpose(const Member& member, Source source, int64_t M, int64_t N, T* target,
               int64_t target_stride) {
  constexpr int L = lanes<T>;
  const int64_t groups = (N + L - 1) / L;
  for (int64_t group = member.begin(groups); group < member.end(groups); group++) {
    const int64_t j = group * L;
    for (int64_t i = 0; i < M; i += L) {
      Vector<T> rows[L];
      for (int k = 0; k < L; k++) rows[k] = i + k < M ? source(i + k, j) : Vector<T>{};
      transpose<T>(rows);
      for (int64_t k = 0; k < std::min<int64_t>(L, N - j); k++)
        store(target + (j + k) * target_stride + i, rows[k], M - i);
    }
  }
}

}  // namespace mmixer::cpu::MMIXER_ISA
