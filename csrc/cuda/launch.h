// Starting a kernel, and how many blocks of it fit: on a GPU by the CUDA runtime, else by
// csrc/emulator. A failure is a std::runtime_error.
#pragma once

#include <string>

#include "device.h"

namespace mmixer::cuda {

// How many blocks, clusters or teams the current device runs at once; refusal: why none, else empty.
struct Resident {
  int count;
  std::string refusal;
};

}  // namespace mmixer::cuda

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>

namespace mmixer::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it is not reported to the next caller too
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

#define MMIXER_CHECK(call) ::mmixer::cuda::check(call, #call)

// A kernel of clusters is compiled to nothing below 9.0. A newer GPU that is handed that PTX all the
// same traps, where a return would leave its caller what happened to be in memory.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, 1)
    entry(const __grid_constant__ typename Kernel::Arguments arguments) {
  extern __shared__ __align__(128) unsigned char shared[];
#if __CUDA_ARCH__ < 900
  if constexpr (Kernel::needs_cluster)
    __trap();
  else
#endif
    Kernel::run(shared, arguments);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  MMIXER_CHECK(cudaGetDevice(&device));
  MMIXER_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Allows a kernel all of a block's shared memory, and clusters of more than 8 blocks. Once per kernel
// and device, as each call to the driver takes a microsecond of a launch.
template <class Kernel>
cudaError_t allow() {
  static std::atomic<uint64_t> allowed{0};  // a bit per device
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  cudaError_t error =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error)
    error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (!error && Kernel::needs_cluster)
    error = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (!error) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <class Kernel>
class Launch {
 public:
  explicit Launch(const Grid& grid) {
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
  MMIXER_CHECK(allow<Kernel>());
  const Launch<Kernel> launch(grid);
  MMIXER_CHECK(cudaLaunchKernelEx(&launch.configuration, entry<Kernel>, arguments));
}

// A device's answer that it cannot run a kernel, whichever error it chooses for that. A lack of memory
// is no such answer, as it may pass: it is thrown.
inline std::string refusal(cudaError_t error, const char* call) {
  if (error == cudaErrorMemoryAllocation) check(error, call);
  cudaGetLastError();
  return std::string(call) + ": " + cudaGetErrorString(error);
}

// Why the current device cannot run a kernel of this build; empty: it can.
template <class Kernel>
std::string refusal() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, entry<Kernel>);
  if (error == cudaSuccess) return "";
  const std::string answer = refusal(error, "cudaFuncGetAttributes");
  const auto version = [](int x) {
    return std::to_string(x / 1000) + "." + std::to_string(x % 1000 / 10);
  };
  int driver = 0, runtime = 0;
  if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess &&
      cudaRuntimeGetVersion(&runtime) == cudaSuccess)
    return driver == 0 ? "there is no NVIDIA driver"
                       : "its driver serves CUDA " + version(driver) +
                             " at most, but this build is of CUDA " + version(runtime) +
                             ": update the driver, or install again with an older toolkit";
  if (error == cudaErrorNoKernelImageForDevice) {
    const std::string major = std::to_string(device_attribute(cudaDevAttrComputeCapabilityMajor)),
                      minor = std::to_string(device_attribute(cudaDevAttrComputeCapabilityMinor));
    return "this build has no kernels for its compute capability " + major + "." + minor +
           ": install again with MMIXER_CUDA_ARCHS=" + major + minor;
  }
  return answer;
}

// Why the current device has no room for a block; empty: it has.
inline std::string without_room(size_t shared_bytes) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (shared_bytes <= size_t(most)) return "";
  return "a block needs " + std::to_string((shared_bytes + 1023) / 1024) +
         " KiB of shared memory, and this GPU has " + std::to_string(most / 1024);
}

template <class Kernel>
Resident resident_clusters(int cluster, size_t shared_bytes) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9)
    return {0, "clusters of blocks need compute capability 9.0 or newer"};
  if (const std::string room = without_room(shared_bytes); !room.empty()) return {0, room};
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, entry<Kernel>))
    return {0, refusal(error, "cudaFuncGetAttributes")};
  // By the virtual architecture, and not by the GPU, it was decided what the kernel is.
  if (attributes.ptxVersion < 90)
    return {0, "this build is for compute capability 8 alone: install again with "
               "MMIXER_CUDA_ARCHS=90"};
  if (const cudaError_t error = allow<Kernel>())
    return {0, refusal(error, "cudaFuncSetAttribute")};
  const Launch<Kernel> launch({cluster, cluster, false, shared_bytes, nullptr});
  int count = 0;
  if (const cudaError_t error =
          cudaOccupancyMaxActiveClusters(&count, entry<Kernel>, &launch.configuration))
    return {0, refusal(error, "cudaOccupancyMaxActiveClusters")};
  if (count == 0)
    return {0, "no cluster of " + std::to_string(cluster) + " blocks fits on this GPU"};
  return {count, ""};
}

template <class Kernel>
Resident resident_blocks(size_t shared_bytes) {
  if (!device_attribute(cudaDevAttrCooperativeLaunch))
    return {0, "this GPU has no cooperative launches"};
  if (const std::string room = without_room(shared_bytes); !room.empty()) return {0, room};
  if (const cudaError_t error = allow<Kernel>())
    return {0, refusal(error, "cudaFuncSetAttribute")};
  int count = 0;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &count, entry<Kernel>, Kernel::threads, shared_bytes))
    return {0, refusal(error, "cudaOccupancyMaxActiveBlocksPerMultiprocessor")};
  if (count == 0) return {0, "no block fits on a multiprocessor of this GPU"};
  return {count * device_attribute(cudaDevAttrMultiProcessorCount), ""};
}

inline void clear(void* p, size_t bytes, void* stream) {
  MMIXER_CHECK(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace mmixer::cuda

#else

#include "../emulator/launch.h"

#endif
