// The declarations of csrc/cuda/cublaslt.h are those of NVIDIA's cublasLt.h: this only compiles.
#include <cublasLt.h>

#include <type_traits>

#include "../../csrc/cuda/cublaslt.h"

using namespace mmixer::cuda::cublaslt;

// What a type is to a call: any pointer, an enumeration's integer, or itself.
template <class T>
using Plain =
    std::conditional_t<std::is_pointer_v<T>, void*,
                       typename std::conditional_t<std::is_enum_v<T>, std::underlying_type<T>,
                                                   std::common_type<T>>::type>;

// An enumeration of C is an int to a call, whatever its sign.
template <class T>
using Passed = std::conditional_t<std::is_same_v<Plain<T>, unsigned>, int, Plain<T>>;

template <class Ours, class Theirs>
constexpr bool agree = false;
template <class A, class... As, class B, class... Bs>
constexpr bool agree<A (*)(As...), B (*)(Bs...)> =
    std::is_same_v<void(Passed<A>, Passed<As>...), void(Passed<B>, Passed<Bs>...)>;

#define AGREE(name) \
  static_assert(agree<decltype(Functions::name), decltype(&::cublasLt##name)>, #name);
MMIXER_CUBLASLT_FUNCTIONS(AGREE)

#define EQUAL(ours, theirs) static_assert(int64_t(ours) == int64_t(theirs), #theirs);
EQUAL(status_success, CUBLAS_STATUS_SUCCESS)
EQUAL(status_invalid_value, CUBLAS_STATUS_INVALID_VALUE)
EQUAL(status_arch_mismatch, CUBLAS_STATUS_ARCH_MISMATCH)
EQUAL(status_not_supported, CUBLAS_STATUS_NOT_SUPPORTED)
EQUAL(type_float32, CUDA_R_32F)
EQUAL(type_float64, CUDA_R_64F)
EQUAL(type_float16, CUDA_R_16F)
EQUAL(type_bfloat16, CUDA_R_16BF)
EQUAL(compute_float32, CUBLAS_COMPUTE_32F)
EQUAL(compute_float64, CUBLAS_COMPUTE_64F)
EQUAL(compute_tf32, CUBLAS_COMPUTE_32F_FAST_TF32)
EQUAL(operation_none, CUBLAS_OP_N)
EQUAL(operation_transposed, CUBLAS_OP_T)
EQUAL(reduction_compute_type, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
EQUAL(property_major, MAJOR_VERSION)
EQUAL(property_minor, MINOR_VERSION)
EQUAL(property_patch, PATCH_LEVEL)
EQUAL(description_transposed_a, CUBLASLT_MATMUL_DESC_TRANSA)
EQUAL(description_transposed_b, CUBLASLT_MATMUL_DESC_TRANSB)
EQUAL(layout_batch, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT)
EQUAL(layout_batch_stride, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET)
EQUAL(preference_workspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
EQUAL(preference_reductions, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
EQUAL(preference_alignment_a, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES)
EQUAL(preference_alignment_b, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES)
EQUAL(preference_alignment_c, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES)
EQUAL(preference_alignment_d, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)

EQUAL(sizeof(Algorithm), sizeof(cublasLtMatmulAlgo_t))
EQUAL(sizeof(Heuristic), sizeof(cublasLtMatmulHeuristicResult_t))
EQUAL(offsetof(Heuristic, workspace_bytes),
      offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize))
EQUAL(offsetof(Heuristic, status), offsetof(cublasLtMatmulHeuristicResult_t, state))
EQUAL(offsetof(Heuristic, waves), offsetof(cublasLtMatmulHeuristicResult_t, wavesCount))
EQUAL(offsetof(Heuristic, reserved), offsetof(cublasLtMatmulHeuristicResult_t, reserved))
