// Starting a kernel, and how many blocks of it fit: on a GPU by the CUDA runtime, else by
// csrc/emulator. A failure is a std::runtime_error.
#pragma once

#include "device.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mmixer::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it is not reported to the next caller too
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

#define MMIXER_CHECK(call) ::mmixer::cuda::check(call, #call)

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, 1)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  extern __shared__ __align__(128) unsigned char shared[];
#if __CUDA_ARCH__ < 900
  if constexpr (Kernel::needs_cluster)
    return;
  else
#endif
    Kernel::run(shared, arguments);
}

template <class Kernel>
class Launch {
 public:
  explicit Launch(const Grid& grid) {
    if (grid.shared_bytes > 48 * 1024)
      MMIXER_CHECK(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        int(grid.shared_bytes)));
    if (grid.cluster > 8)
      MMIXER_CHECK(cudaFuncSetAttribute(entry<Kernel>,
                                        cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    configuration.gridDim = dim3(grid.blocks);
    configuration.blockDim = dim3(Kernel::threads);
    configuration.dynamicSmemBytes = grid.shared_bytes;
    configuration.stream = static_cast<cudaStream_t>(grid.stream);
    configuration.attrs = attributes_;
    if (grid.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes_[configuration.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    }
    if (grid.cooperative) {
      cudaLaunchAttribute& attribute = attributes_[configuration.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }

  cudaLaunchConfig_t configuration{};

 private:
  cudaLaunchAttribute attributes_[2];
};

template <class Kernel>
void launch(const Grid& grid, const typename Kernel::Arguments& arguments) {
  const Launch<Kernel> launch(grid);
  MMIXER_CHECK(cudaLaunchKernelEx(&launch.configuration, entry<Kernel>, arguments));
}

// How many clusters the current device runs at once; 0: it has no such clusters.
template <class Kernel>
int resident_clusters(int cluster, size_t shared_bytes) {
  int device = 0, major = 0, limit = 0, count = 0;
  MMIXER_CHECK(cudaGetDevice(&device));
  MMIXER_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  MMIXER_CHECK(
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (major < 9 || shared_bytes > size_t(limit)) return 0;
  const Launch<Kernel> launch({cluster, cluster, false, shared_bytes, nullptr});
  const cudaError_t error =
      cudaOccupancyMaxActiveClusters(&count, entry<Kernel>, &launch.configuration);
  if (error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration) {
    cudaGetLastError();  // an answer, not a failure: this device has only smaller clusters
    return 0;
  }
  check(error, "cudaOccupancyMaxActiveClusters");
  return count;
}

// How many blocks the current device runs at once.
template <class Kernel>
int resident_blocks(size_t shared_bytes) {
  int device = 0, processors = 0, cooperative = 0, limit = 0, count = 0;
  MMIXER_CHECK(cudaGetDevice(&device));
  MMIXER_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  MMIXER_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  MMIXER_CHECK(
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (!cooperative || shared_bytes > size_t(limit)) return 0;
  const Launch<Kernel> launch({1, 1, true, shared_bytes, nullptr});
  MMIXER_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, entry<Kernel>,
                                                             Kernel::threads, shared_bytes));
  return count * processors;
}

inline void clear(void* p, size_t bytes, void* stream) {
  MMIXER_CHECK(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace mmixer::cuda

#else

#include "../emulator/launch.h"

#endif
