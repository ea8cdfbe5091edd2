// Copies of tables of rows, in another dtype, as blocks of a launch that does more. A warp copies
// up to 256 columns of a row at a time, all of them in flight at once; the bound is memory, and
// with few rows one latency of it. Blocks exchange nothing.
#pragma once

#include "dtype.h"

namespace mmixer::cuda {

constexpr int copied_at_once = copied_columns / 32;

// Writes a lane's share of a row of `columns` columns.
template <Dtype to, class T, class Lane>
MMIXER_DEVICE void store_copied(void* p, int64_t first, int64_t columns, const Lane& x) {
  Stored<to>* const target = static_cast<Stored<to>*>(p) + first;
  MMIXER_UNROLL
  for (int i = 0; i < copied_at_once; i++)
    if (32 * i < columns) target[32 * i] = encode<to>(T(x[i]));
}

// Copies every step-th piece of a row from the first on.
template <Dtype from>
MMIXER_DEVICE void copy_pieces(const Copy& c, int64_t first, int64_t step) {
  using T = std::conditional_t<from == Dtype::float64, double, float>;
  const int lane = thread_index() % 32;
  const int64_t pieces = (c.columns + copied_columns - 1) / copied_columns;
  MMIXER_NO_UNROLL
  for (int64_t piece = first; piece < c.tables * c.rows * pieces; piece += step) {
    const int64_t all_rows = piece / pieces, table = all_rows / c.rows, row = all_rows % c.rows;
    const int64_t column = (piece - all_rows * pieces) * copied_columns + lane;
    const int64_t columns = c.columns - column;  // from this lane's first on
    const bool exists = c.source && (!c.lengths || table < load(c.lengths + row));
    const int64_t offset = table * c.source_stride_table + row * c.source_stride_row + column;
    const Stored<from>* const source = static_cast<const Stored<from>*>(c.source) + offset;
    T x[copied_at_once] = {};
    MMIXER_UNROLL
    for (int i = 0; i < copied_at_once; i++)
      if (exists && 32 * i < columns) x[i] = decode<T, from>(load(source + 32 * i));
    const int64_t to = table * c.target_stride_table + row * c.target_stride_row + column;
    switch (c.target_dtype) {
      case Dtype::float32: store_copied<Dtype::float32, T>(c.target, to, columns, x); break;
      case Dtype::float64: store_copied<Dtype::float64, T>(c.target, to, columns, x); break;
      case Dtype::bfloat16: store_copied<Dtype::bfloat16, T>(c.target, to, columns, x); break;
      case Dtype::float16: store_copied<Dtype::float16, T>(c.target, to, columns, x); break;
      case Dtype::int8: break;  // `check` refuses it
    }
  }
}

// The share of a block of so many warps; block counts those that copy.
template <int most>
MMIXER_DEVICE void copy_share(const Copies<most>& all, int block, int warps) {
  int i = 0, first = 0;
  while (block >= all.copy[i].end) first = all.copy[i++].end;
  const Copy& c = all.copy[i];
  const int64_t warp = int64_t(block - first) * warps + thread_index() / 32;
  const int64_t step = int64_t(c.end - first) * warps;
  switch (c.source_dtype) {
    case Dtype::float32: return copy_pieces<Dtype::float32>(c, warp, step);
    case Dtype::float64: return copy_pieces<Dtype::float64>(c, warp, step);
    case Dtype::bfloat16: return copy_pieces<Dtype::bfloat16>(c, warp, step);
    case Dtype::float16: return copy_pieces<Dtype::float16>(c, warp, step);
    case Dtype::int8: break;  // `check` refuses it
  }
}

template <int most>
MMIXER_CONSTANT int copying_blocks(const Copies<most>& all) {
  return all.copies ? all.copy[all.copies - 1].end : 0;
}

}  // namespace mmixer::cuda
