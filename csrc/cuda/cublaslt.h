// The cuBLASLt that the process has loaded, as PyTorch's CUDA builds have: found at run time by its
// name without its version, so that one build serves all of them. No header of CUDA's is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "products.h"

namespace mmixer::cuda::cublaslt {

// The part of cublasLt.h that is used here: tests/csrc/cublaslt_header.cpp compares it with
// NVIDIA's. Enumerations are ints in C, and pointers to what is opaque are void*.
using Status = int;
enum : Status {
  status_success = 0,
  status_invalid_value = 7,
  status_arch_mismatch = 8,
  status_not_supported = 15,
};
enum : int { type_float32 = 0, type_float64 = 1, type_float16 = 2, type_bfloat16 = 14 };
enum : int { compute_float32 = 68, compute_float64 = 70, compute_tf32 = 77 };
enum : int32_t { operation_none = 0, operation_transposed = 1 };
enum : uint32_t { reduction_compute_type = 2 };
enum : int { property_major, property_minor, property_patch };
enum : int { description_transposed_a = 3, description_transposed_b = 4 };
enum : int { layout_batch = 5, layout_batch_stride = 6 };
enum : int {
  preference_workspace = 1,
  preference_reductions = 3,
  preference_alignment_a = 5,
  preference_alignment_b,
  preference_alignment_c,
  preference_alignment_d,
};

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status status;
  float waves;
  int reserved[4];
};

// cublasLtCreate and so on, by their names without the library's.
struct Functions {
  Status (*Create)(void** handle);
  Status (*GetProperty)(int property, int* value);
  Status (*MatmulDescCreate)(void** description, int compute_type, int scale_type);
  Status (*MatmulDescDestroy)(void* description);
  Status (*MatmulDescSetAttribute)(void* description, int attribute, const void* value,
                                   size_t bytes);
  Status (*MatrixLayoutCreate)(void** layout, int type, uint64_t rows, uint64_t columns,
                               int64_t leading);
  Status (*MatrixLayoutDestroy)(void* layout);
  Status (*MatrixLayoutSetAttribute)(void* layout, int attribute, const void* value, size_t bytes);
  Status (*MatmulPreferenceCreate)(void** preference);
  Status (*MatmulPreferenceDestroy)(void* preference);
  Status (*MatmulPreferenceSetAttribute)(void* preference, int attribute, const void* value,
                                         size_t bytes);
  Status (*MatmulAlgoGetHeuristic)(void* handle, void* description, void* a, void* b, void* c,
                                   void* d, void* preference, int most, Heuristic* found,
                                   int* count);
  Status (*Matmul)(void* handle, void* description, const void* alpha, const void* a,
                   void* a_layout, const void* b, void* b_layout, const void* beta, const void* c,
                   void* c_layout, void* d, void* d_layout, const Algorithm* algorithm,
                   void* workspace, size_t workspace_bytes, void* stream);
  const char* (*GetStatusString)(Status status);  // null before 11.4
};

#define MMIXER_CUBLASLT_FUNCTIONS(X) \
  X(Create)                          \
  X(GetProperty)                     \
  X(MatmulDescCreate)                \
  X(MatmulDescDestroy)               \
  X(MatmulDescSetAttribute)          \
  X(MatrixLayoutCreate)              \
  X(MatrixLayoutDestroy)             \
  X(MatrixLayoutSetAttribute)        \
  X(MatmulPreferenceCreate)          \
  X(MatmulPreferenceDestroy)         \
  X(MatmulPreferenceSetAttribute)    \
  X(MatmulAlgoGetHeuristic)          \
  X(Matmul)                          \
  X(GetStatusString)

// The reason why there is no cuBLASLt to use; empty where there is. It is looked for once.
const std::string& refusal();

// Its version, such as "13.1.0".
std::string version();

// The way in which products alike are made: of the same sizes, strides, dtypes and alignments of
// addresses, on one device.
class Matmul;

// The Matmul of a product that was made before, or null.
std::shared_ptr<const Matmul> find(int device, const Product& product);

// Makes a product's Matmul, by one query of the heuristic, and keeps it; device is the current one.
// It works on the host alone, except that a device's first makes a handle, which takes some memory
// of the device. A failure is a std::runtime_error that names the call and the product.
std::shared_ptr<const Matmul> make(int device, const Product& product);

// Enqueues the product. False where cuBLASLt does not take products like it.
bool multiply(const Matmul& matmul, const Product& product, void* workspace, void* stream);

// The products that it did not take, with the reasons: the first 64.
std::vector<std::string> refused_products();

}  // namespace mmixer::cuda::cublaslt
