// The matrix products of a pass: on a GPU by the cuBLASLt that the process has loaded, where there
// is one, else by the kernel of product_kernel.h; on a CPU, beside csrc/emulator, by plain loops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"

namespace mmixer::cuda {

// A matrix per product of a batch. Strides are in elements: from one row of what lies in memory to
// the next, and from one matrix of the batch to the next (0: all share one).
struct Operand {
  const void* p;
  int64_t stride, batch_stride;
  bool transposed;  // in memory lie the columns, one after another, instead of the rows
};

// result[i] = a[i] b[i] for i < batch, row-major: a [rows][inner], b [inner][columns], result
// [rows] [columns]. The products are summed in float32, or in float64 for float64.
struct Product {
  int64_t batch, rows, columns, inner;
  Operand a, b;
  Dtype dtype;  // of both operands
  void* result;
  int64_t result_stride, result_batch_stride;
  Dtype result_dtype;  // float64 for float64, else float32 or dtype
  bool allow_tf32;     // float32 operands may be rounded to TF32
};

// The memory that multiply may use: the caller's, at a multiple of 256, free for the next product
// of the same stream.
constexpr size_t product_workspace_bytes = size_t(32) << 20;

// Enqueues the product on the current device. It neither synchronises nor allocates memory of the
// device, and may be captured in a CUDA graph. A failure is a std::runtime_error.
void multiply(const Product& product, void* workspace, void* stream);

// What makes the products on the current device: "cuBLASLt 13.0.0", or "own kernel: REASON".
std::string product_library();

// The products that cuBLASLt would not take on any device so far, and which the own kernel made
// instead: a line per shape, with the reason.
std::vector<std::string> product_fallbacks();

}  // namespace mmixer::cuda
