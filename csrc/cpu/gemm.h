// C = A B, the matrix product of everything that is large or repeated.
//
// B is cut into panels: one vector of columns and all k. What is read many times is packed first,
// each panel contiguous; else B is read where its rows lie, which costs a product 1 to 4 % and
// saves the copy. A tile of MR rows of A and NR panels keeps its part of C in registers while k
// runs; a step loads NR vectors of B and broadcasts MR values of A. A member owns a range of rows,
// or of panels where there are few rows. Bound: FMA throughput from three rows on, the bandwidth of
// B below.
//
// Each element of C is summed in chains of multiply-adds in the order of k, one chain after the
// other: its bits do not depend on tiles, threads or the number of rows.
#pragma once

#include <algorithm>

#include "team.h"
#include "vector.h"

namespace mmixer::cpu::MMIXER_ISA {

// The length of a panel. A cache line is left free, lest all panels meet in one set of L1.
template <class T>
inline int64_t panel_size(int64_t K) {
  return (K + 64 / vector_bytes) * lanes<T>;
}

template <class T>
inline int64_t panels_size(int64_t K, int64_t N) {
  return (N + lanes<T> - 1) / lanes<T> * panel_size<T>(K);
}

// B as a product reads it: the vector of row k and panel i lies at data + k * k_step +
// i * panel_step.
template <class T>
struct Operand {
  const T* data;
  int64_t k_step, panel_step;
};

template <class T>
inline Operand<T> packed(const T* panels, int64_t K) {
  return {panels, lanes<T>, panel_size<T>(K)};
}

// Rows of B where they lie; whole vectors are read, also at the end of a row.
template <class T>
inline Operand<T> in_place(const T* rows, int64_t stride) {
  return {rows, stride, lanes<T>};
}

// Packs rows of B: rows(k)(n) is the vector of row k's elements from n on.
template <class T, class Rows>
void pack_rows(const Member& member, Rows rows, int64_t K, int64_t N, T* panels) {
  constexpr int L = lanes<T>;
  const int64_t count = (N + L - 1) / L, size = panel_size<T>(K);
  constexpr int64_t together = 8;  // panels written side by side, so that rows are read in lines
  for (int64_t i = member.begin(count); i < member.end(count); i += together) {
    const int64_t next = std::min(i + together, member.end(count));
    for (int64_t k = 0; k < K; k++) {
      const auto row = rows(k);
      for (int64_t j = i; j < next; j++) store(panels + j * size + k * L, row(j * L));
    }
  }
}

// Packs B[k][n] = w[n * stride + k]: a weight of N rows, as PyTorch stores it. Stored is T, or
// bfloat16 where T is float.
template <class T, class Stored>
void pack_transposed(const Member& member, const Stored* w, int64_t stride, int64_t K, int64_t N,
                     T* panels) {
  constexpr int L = lanes<T>;
  const int64_t count = (N + L - 1) / L, size = panel_size<T>(K);
  for (int64_t i = member.begin(count); i < member.end(count); i++) {
    const Stored* source = w + i * L * stride;
    const int64_t rows = std::min<int64_t>(L, N - i * L);
    T* target = panels + i * size;
    for (int64_t k = 0; k < K; k += L) {
      Vector<T> block[L];
      if (rows == L && k + L <= K) {
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) block[j] = load(source + j * stride + k);
        transpose<T>(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) store(target + (k + j) * L, block[j]);
      } else {
        for (int j = 0; j < L; j++)
          block[j] = j < rows ? load(source + j * stride + k, K - k) : Vector<T>{};
        transpose<T>(block);
        for (int64_t j = 0; j < std::min<int64_t>(L, K - k); j++)
          store(target + (k + j) * L, block[j]);
      }
    }
  }
}

// The terms of a chain: long chains cost precision, and short ones the time of adding them to C.
constexpr int64_t chain = 128;

constexpr int tile_rows = vector_registers == 32 ? 8 : 6;

// The panels of a tile of mr rows: sums, one step's B and one value of A fill the registers.
constexpr int tile_panels(int mr) { return std::min(8, (vector_registers - 1) / (mr + 1)); }

// A tile is kept out of its callers, whose live values would push the sums out of the registers.
template <class T, int MR, int NR>
__attribute__((noinline)) void gemm_tile(const T* const* a, int64_t a_step, const Operand<T>& b,
                                         int64_t K, T* const* c, int64_t columns, bool accumulate) {
  MMIXER_TILE("gemm", T, MR, NR);
  using V = Vector<T>;
  constexpr int L = lanes<T>;
  const T* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) row[i] = a[i];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) __builtin_prefetch(c[i] + j * L, 1);
  const T* const panels = b.data;
  const int64_t k_step = b.k_step, size = b.panel_step;
  for (int64_t first = 0; first < K; first += chain) {
    V sums[MR][NR] = {};
    const int64_t last = std::min(first + chain, K);
#pragma GCC unroll 4
    for (int64_t k = first; k < last; k++) {
      V step[NR];
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) step[j] = load(panels + j * size + k * k_step);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        const V value = broadcast(row[i][k * a_step]);
#pragma GCC unroll 8
        for (int j = 0; j < NR; j++) sums[i][j] += value * step[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) {
        T* target = c[i] + j * L;
        if (accumulate || first > 0) sums[i][j] += load(target, columns - j * L);
        store(target, sums[i][j], columns - j * L);
      }
  }
}

// Calls body(first, last) for parts of [begin, end) of at most `limit`, as equal as they can be.
template <class Body>
inline void in_parts(int64_t begin, int64_t end, int64_t limit, Body body) {
  if (begin == end) return;
  const int64_t parts = (end - begin + limit - 1) / limit, size = (end - begin) / parts;
  for (int64_t longer = (end - begin) % parts; begin < end; longer--) {
    const int64_t next = begin + size + (longer > 0);
    body(begin, next);
    begin = next;
  }
}

// c(m)[n] (+)= sum_k a(m)[k * a_step] B[k][n] for m < M, n < N; a and c give the rows' addresses.
template <class T, class RowsA, class RowsC>
void gemm(const Member& member, RowsA a, int64_t a_step, int64_t M, Operand<T> b, int64_t N,
          int64_t K, RowsC c, bool accumulate = false) {
  constexpr int L = lanes<T>;
  constexpr int64_t block = 8 * tile_rows;  // rows that stay in L2 while the panels pass
  const int64_t count = (N + L - 1) / L, blocks = (M + tile_rows - 1) / tile_rows;
  int64_t m_begin = 0, m_end = M, first = 0, last = count;
  if (blocks >= 4 * member.size()) {
    m_begin = member.begin(blocks) * tile_rows;
    m_end = std::min(M, member.end(blocks) * tile_rows);
  } else {
    first = member.begin(count);
    last = member.end(count);
  }
  in_parts(m_begin, m_end, block, [&](int64_t m_first, int64_t m_last) {
    const int64_t tiles = (m_last - m_first + tile_rows - 1) / tile_rows;
    const int most_rows = int((m_last - m_first + tiles - 1) / tiles);
    in_parts(first, last, tile_panels(most_rows), [&](int64_t i, int64_t i_next) {
      in_parts(m_first, m_last, tile_rows, [&](int64_t m, int64_t m_next) {
        with_constant<tile_rows>(m_next - m, [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          const T* a_rows[MR];
          T* c_rows[MR];
          for (int row = 0; row < MR; row++)
            a_rows[row] = a(m + row), c_rows[row] = c(m + row) + i * L;
          const Operand<T> part{b.data + i * b.panel_step, b.k_step, b.panel_step};
          with_constant<tile_panels(MR)>(i_next - i, [&](auto nr) {
            gemm_tile<T, MR, decltype(nr)::value>(a_rows, a_step, part, K, c_rows, N - i * L,
                                                  accumulate);
          });
        });
      });
    });
  });
}

}  // namespace mmixer::cpu::MMIXER_ISA
