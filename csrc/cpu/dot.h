// C = A W^T without packing, for weights that a call uses once: a single step, and the context.
//
// Both operands are read along k, as PyTorch stores them: W passes once, from where it lies. A
// member owns a range of rows of A, or of columns of C where there are few rows. Bound: the
// bandwidth of W up to four rows, FMA throughput above.
//
// Each element of C is summed in an order that depends on K alone, lane by lane and then across
// lanes: not on tiles, threads or the number of rows. (It is another order than gemm.h's.)
#pragma once

#include <algorithm>
#include <cstdint>

#include "team.h"
#include "vector.h"

namespace mmixer::cpu::MMIXER_ISA {

constexpr int dot_rows = 4;

// The columns of a tile of mr rows, such that sums and one operand fill the registers.
constexpr int dot_columns(int mr) {
  if (vector_registers == 32) return mr == 1 ? 8 : 6;
  return mr == 1 ? 8 : mr == 2 ? 5 : mr == 3 ? 4 : 3;
}

// Two vectors of a row's elements. For bfloat16 they are the elements of even and of odd number,
// halves of 32-bit words, which take one instruction each to widen.
template <class T>
struct Pair {
  Vector<T> a, b;
};

template <class Stored, class T>
constexpr bool interleaved = !std::is_same_v<Stored, T>;

template <class T>
inline Pair<T> load_pair(const T* p) {
  return {load(p), load(p + lanes<T>)};
}

template <class T>
inline Pair<T> load_pair(const bfloat16* p) {
  IntVector<T> words;
  std::memcpy(&words, p, sizeof words);
  return {(Vector<T>)(words << 16), (Vector<T>)(words & int32_t(0xffff0000))};
}

template <class T, int... lane>
inline Pair<T> even_and_odd(Pair<T> x, std::integer_sequence<int, lane...> sequence) {
  if constexpr (sizeof...(lane) == 8) {  // AVX2 shuffles within halves in a third of the time
    exchange<T, 4>(x.a, x.b, sequence);
    return {MMIXER_SHUFFLE(T, x.a, x.b, 0, 2, 8, 10, 4, 6, 12, 14),
            MMIXER_SHUFFLE(T, x.a, x.b, 1, 3, 9, 11, 5, 7, 13, 15)};
  }
  return {MMIXER_SHUFFLE(T, x.a, x.b, (2 * lane)...),
          MMIXER_SHUFFLE(T, x.a, x.b, (2 * lane + 1)...)};
}

// A row of A, in the order of a row of W.
template <class Stored, class T>
inline Pair<T> in_order_of(Pair<T> x) {
  if constexpr (interleaved<Stored, T>)
    return even_and_odd<T>(x, std::make_integer_sequence<int, lanes<T>>{});
  else
    return x;
}

// The elements whose number is at least `first`, and zeros below.
template <class Stored, class T>
inline Pair<T> keep_from(Pair<T> x, int first) {
  if constexpr (interleaved<Stored, T>)
    return {keep_from<T>(x.a, (first + 1) / 2), keep_from<T>(x.b, first / 2)};
  else
    return {keep_from<T>(x.a, first), keep_from<T>(x.b, first - lanes<T>)};
}

// Fetches the place that a tile's is so many elements before, in the next tile, whose rows the
// processor does not foresee: without it a step's products take up to a seventh longer. There may
// be no next one: a prefetch cannot fault, but a pointer must not leave its array.
template <int bytes, class Stored>
inline void prefetch(const Stored* place, int64_t distance) {
  const uintptr_t next = reinterpret_cast<uintptr_t>(place) + distance * sizeof(Stored);
  for (int offset = 0; offset < bytes; offset += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(next + offset));
}

// A tile is kept out of its callers, whose live values would push the sums out of the registers.
template <class T, int MR, int NR, class Stored>
__attribute__((noinline)) void dot_tile(const T* const* a, const Stored* w, int64_t w_stride,
                                        int64_t K, T* const* c, int64_t n) {
  MMIXER_TILE("dot", Stored, MR, NR);
  constexpr int L = lanes<T>, step = 2 * L;
  Vector<T> sums[MR][NR] = {};
  // Adds the products of both operands' elements [k, k + step), of which `keep` may zero some.
  const auto add = [&](const T* const* rows, const Stored* columns, int64_t stride, int64_t k,
                       auto keep) __attribute__((always_inline)) {
    Pair<T> row[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) row[i] = keep(in_order_of<Stored, T>(load_pair<T>(rows[i] + k)));
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      const Stored* const place = columns + j * stride + k;
      if constexpr (MR == 1) prefetch<2 * L * sizeof(Stored)>(place, NR * stride);
      const Pair<T> column = keep(load_pair<T>(place));
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        sums[i][j] += row[i].a * column.a;
        sums[i][j] += row[i].b * column.b;
      }
    }
  };
  const auto all = [](Pair<T> x) { return x; };
  const int64_t whole = K / step * step;
  for (int64_t k = 0; k < whole; k += step) add(a, w, w_stride, k, all);
  if (whole < K && K >= step) {
    // The last step ends with the row: what it repeats is masked in both operands.
    const int first = int(step - (K - whole));
    add(a, w, w_stride, K - step, [=](Pair<T> x) { return keep_from<Stored, T>(x, first); });
  } else if (whole < K) {
    T rows[MR][step] = {};
    Stored columns[NR][step] = {};
    const T* row[MR];
    for (int i = 0; i < MR; i++) row[i] = std::copy_n(a[i], K, rows[i]) - K;
    for (int j = 0; j < NR; j++) std::copy_n(w + j * w_stride, K, columns[j]);
    add(row, columns[0], step, 0, all);
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
    for (int j = 0; j < NR; j++) c[i][n + j] = total[i * NR + j];
}

template <class T, int MR, int NR, class Stored>
inline void dot_tiles(const T* const* a, const Stored* w, int64_t w_stride, int64_t K, T* const* c,
                      int64_t n, int64_t n_end) {
  for (; n + NR <= n_end; n += NR) dot_tile<T, MR, NR>(a, w + n * w_stride, w_stride, K, c, n);
  if constexpr (NR > 1)
    if (n < n_end) dot_tiles<T, MR, NR / 2>(a, w, w_stride, K, c, n, n_end);
}

// c(m)[n] = sum_k a(m)[k] w[n * w_stride + k] for m < M, n < N; a and c give the rows' addresses.
// Stored is T, or bfloat16 where T is float.
template <class T, class RowsA, class Stored, class RowsC>
void dot(const Member& member, RowsA a, int64_t M, const Stored* w, int64_t w_stride, int64_t N,
         int64_t K, RowsC c) {
  constexpr int64_t block = 3 * dot_rows;  // rows that stay in L1 while W passes
  constexpr int64_t panel = 24;            // columns of W that stay in L1 while these rows pass
  int64_t m = 0, m_end = M, n = 0, n_end = N;
  const int64_t blocks = (M + block - 1) / block;
  if (blocks >= 2 * member.size()) {
    m = member.begin(blocks) * block;
    m_end = std::min(M, member.end(blocks) * block);
  } else {
    n = member.begin(N);
    n_end = member.end(N);
  }
  for (; m < m_end; m += block) {
    const int64_t rows = std::min(block, m_end - m);
    const T* a_rows[block];
    T* c_rows[block];
    for (int64_t i = 0; i < rows; i++) a_rows[i] = a(m + i), c_rows[i] = c(m + i);
    for (int64_t first = n; first < n_end; first += panel) {
      const int64_t last = std::min(first + panel, n_end);
      for (int64_t i = 0; i < rows; i += dot_rows)
        with_constant<dot_rows>(std::min<int64_t>(dot_rows, rows - i), [&](auto mr) {
          constexpr int MR = decltype(mr)::value;
          dot_tiles<T, MR, dot_columns(MR)>(a_rows + i, w, w_stride, K, c_rows + i, first, last);
        });
    }
  }
}

}  // namespace mmixer::cpu::MMIXER_ISA
