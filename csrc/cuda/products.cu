#include "products.h"

#include <stdexcept>

#include "launch.h"
#include "product_kernel.h"

#ifdef __CUDACC__
#include "cublaslt.h"
#else
#include "../emulator/products.h"
#endif

namespace mmixer::cuda {
namespace {

template <Dtype dtype>
void run_kernel(const Product& product, void* stream) {
  using Kernel = ProductKernel<dtype>;
  const int blocks = Kernel::blocks(product, processors());
  launch<Kernel>({blocks, 1, false, sizeof(typename Kernel::Shared), stream}, {product, blocks});
}

void run_kernel(const Product& product, void* stream) {
  switch (product.dtype) {
    case Dtype::float32: return run_kernel<Dtype::float32>(product, stream);
    case Dtype::float64: return run_kernel<Dtype::float64>(product, stream);
    case Dtype::bfloat16: return run_kernel<Dtype::bfloat16>(product, stream);
    case Dtype::float16: return run_kernel<Dtype::float16>(product, stream);
    case Dtype::int8: break;  // `check` refuses it
  }
}

}  // namespace

#ifdef __CUDACC__

namespace {

int current_device() {
  int device = 0;
  MMIXER_CHECK(cudaGetDevice(&device));
  return device;
}

// While it lives, this thread's calls may allocate memory and load kernels although a stream is
// being captured: cuBLASLt's handle and its first product of a shape do, on no stream. The capture
// itself is not touched.
class AllocationDuringCapture {
 public:
  AllocationDuringCapture() { MMIXER_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~AllocationDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllocationDuringCapture(const AllocationDuringCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Whether cuBLASLt has made the product.
bool multiply_by_library(const Product& product, void* workspace, void* stream) {
  if (!cublaslt::refusal().empty()) return false;
  const int device = current_device();
  if (const auto matmul = cublaslt::find(device, product))
    return cublaslt::multiply(*matmul, product, workspace, stream);
  const AllocationDuringCapture allowed;
  return cublaslt::multiply(*cublaslt::make(device, product), product, workspace, stream);
}

}  // namespace

std::string product_library() {
  const std::string refusal = cublaslt::refusal();
  return refusal.empty() ? "cuBLASLt " + cublaslt::version() : "own kernel: " + refusal;
}

std::vector<std::string> product_fallbacks() { return cublaslt::refused_products(); }

#else

namespace {

bool multiply_by_library(const Product& product, void* /*workspace*/, void* stream) {
  if (options().product_kernel) return false;
  return emulator::multiply(product, stream), true;
}

}  // namespace

std::string product_library() {
  return options().product_kernel ? "own kernel: the emulator was told so" : "loops on a CPU";
}

std::vector<std::string> product_fallbacks() { return {}; }

#endif

void multiply(const Product& product, void* workspace, void* stream) {
  if (product.batch == 0 || product.rows == 0 || product.columns == 0) return;
  if (!multiply_by_library(product, workspace, stream)) run_kernel(product, stream);
}

}  // namespace mmixer::cuda
