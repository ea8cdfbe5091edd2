// Products of many kinds against float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/dtype.h"
#include "../../csrc/cuda/products.h"

namespace {

using namespace mmixer;
using namespace mmixer::cuda;

int failures = 0;

// Memory of a dtype, filled with NaN.
struct Array {
  Dtype dtype;
  std::vector<unsigned char> bytes;

  Array(Dtype dtype, int64_t size) : dtype(dtype), bytes(size * size_of(dtype)) {
    for (int64_t i = 0; i < size; i++) set(i, NAN);
  }
  void set(int64_t i, double x) { store_as(bytes.data(), dtype, i, x); }
  double get(int64_t i) const { return load_as<double>(bytes.data(), dtype, i); }
};

// A batch of matrices, as they lie in memory; `gap` elements after a line and after a matrix.
struct Matrices {
  Array array;
  int64_t stride, batch_stride;

  Matrices(Dtype dtype, int64_t batch, int64_t lines, int64_t length, int gap)
      : array(dtype, batch * (lines * (length + gap) + gap) + 1),
        stride(length + gap),
        batch_stride(lines * stride + gap) {}
  int64_t at(int64_t batch, int64_t line, int64_t i) const {
    return batch * batch_stride + line * stride + i;
  }
};

std::mt19937 generator(7);

Matrices random_matrices(Dtype dtype, int64_t batch, int64_t lines, int64_t length, int gap) {
  std::normal_distribution<float> normal;
  Matrices x(dtype, batch, lines, length, gap);
  for (int64_t i = 0; i < batch; i++)
    for (int64_t line = 0; line < lines; line++)
      for (int64_t j = 0; j < length; j++) x.array.set(x.at(i, line, j), normal(generator));
  return x;
}

struct Case {
  int64_t batch, rows, columns, inner;
  bool a_transposed, b_transposed, shared;  // shared: all products have the same a
  int gap;
  Dtype dtype, result_dtype;
};

double rounding(Dtype dtype) {
  return std::ldexp(1, dtype == Dtype::float64    ? -53
                       : dtype == Dtype::float32  ? -24
                       : dtype == Dtype::bfloat16 ? -9
                                                  : -12);
}

void fail(const Case& c, const char* what) {
  std::printf(
      "FAILED: %d x [%d, %d] [%d, %d], dtypes %d and %d, transposed %d and %d, gap %d: %s\n",
      int(c.batch), int(c.rows), int(c.inner), int(c.inner), int(c.columns), int(c.dtype),
      int(c.result_dtype), c.a_transposed, c.b_transposed, c.gap, what);
  failures++;
}

using Multiply = std::function<void(const Product&)>;

void check(const Case& c, const Multiply& multiply) {
  const Matrices a = random_matrices(c.dtype, c.shared ? 1 : c.batch,
                                     c.a_transposed ? c.inner : c.rows,
                                     c.a_transposed ? c.rows : c.inner, c.gap),
                 b = random_matrices(c.dtype, c.batch, c.b_transposed ? c.columns : c.inner,
                                     c.b_transposed ? c.inner : c.columns, c.gap);
  Matrices result(c.result_dtype, c.batch, c.rows, c.columns, c.gap);
  const Array empty = result.array;
  multiply({c.batch,
            c.rows,
            c.columns,
            c.inner,
            {a.array.bytes.data(), a.stride, c.shared ? 0 : a.batch_stride, c.a_transposed},
            {b.array.bytes.data(), b.stride, b.batch_stride, c.b_transposed},
            c.dtype,
            result.array.bytes.data(),
            result.stride,
            result.batch_stride,
            c.result_dtype,
            false});
  const double wide = rounding(c.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32);
  for (int64_t i = 0; i < c.batch; i++)
    for (int64_t row = 0; row < c.rows; row++)
      for (int64_t column = 0; column < c.columns; column++) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < c.inner; k++) {
          const int64_t of_a = c.a_transposed ? a.at(0, k, row) : a.at(0, row, k);
          const int64_t of_b = c.b_transposed ? b.at(i, column, k) : b.at(i, k, column);
          const double term =
              a.array.get(of_a + (c.shared ? 0 : i * a.batch_stride)) * b.array.get(of_b);
          sum += term, size += std::fabs(term);
        }
        const double error = std::fabs(result.array.get(result.at(i, row, column)) - sum);
        const double bound = double(c.inner) * wide * size + 2 * rounding(c.result_dtype) * size;
        if (!(error <= bound)) return fail(c, "the error is too large");
        result.array.set(result.at(i, row, column), NAN);
      }
  if (result.array.bytes != empty.bytes) fail(c, "something else was written");
}

void check_all(const Multiply& multiply) {
  const Dtype dtypes[][2] = {{Dtype::float32, Dtype::float32},   {Dtype::float64, Dtype::float64},
                             {Dtype::bfloat16, Dtype::bfloat16}, {Dtype::bfloat16, Dtype::float32},
                             {Dtype::float16, Dtype::float16},   {Dtype::float16, Dtype::float32}};
  const int64_t sizes[][4] = {{1, 1, 1, 1},
                              {3, 1, 5, 1},
                              {2, 7, 1, 40},
                              {1, 64, 64, 32},
                              {2, 65, 70, 33}};
  for (const auto& [dtype, result_dtype] : dtypes)
    for (const auto& [batch, rows, columns, inner] : sizes)
      for (const int options : {0, 1, 2, 3, 7})
        for (const int gap : {0, 3})
          check({batch, rows, columns, inner, (options & 1) != 0, (options & 2) != 0,
                 (options & 4) != 0, gap, dtype, result_dtype},
                multiply);
}

}  // namespace
