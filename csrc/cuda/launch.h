// Functions that start a kernel and tell how many blocks of it fit: on a GPU by the CUDA runtime,
// else by csrc/emulator. A failure is a std::runtime_error.
#pragma once

#include <string>

#include "device.h"

namespace mmixer::cuda {

// The number of blocks, clusters or teams that the current device runs at once; refusal says why it
// is 0, else it is empty.
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

// A kernel of clusters is a trap below compute capability 9.0. If a newer GPU is handed that PTX
// all the same, its call fails, where a return would leave its caller what happened to be in
// memory.
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

// The outcome of a call to the runtime.
struct Answer {
  cudaError_t error;
  const char* call;
};

#define MMIXER_ANSWER(call) \
  ::mmixer::cuda::Answer { call, #call }

// Allows a kernel what a launch may not have by default: more than 48 KiB of shared memory, and
// more than 8 blocks in a cluster. It does so once per kernel and device, as a call to the driver
// takes a microsecond.
template <class Kernel>
Answer allow(size_t shared_bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit per device
  if (!Kernel::needs_cluster && shared_bytes <= 48 * 1024) return {cudaSuccess, ""};
  int device = 0, most = 0;
  if (const Answer answer = MMIXER_ANSWER(cudaGetDevice(&device)); answer.error) return answer;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return {cudaSuccess, ""};
  Answer answer =
      MMIXER_ANSWER(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (!answer.error)
    answer = MMIXER_ANSWER(
        cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  if (!answer.error && Kernel::needs_cluster)
    answer = MMIXER_ANSWER(
        cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  if (!answer.error) allowed.fetch_or(bit, std::memory_order_relaxed);
  return answer;
}

template <class Kernel>
class Launch {
 public:
  explicit Launch(const Grid& grid) {
    configuration.gridDim = dim3(grid.blocks);
    configuration.blockDim = dim3(grid.threads ? grid.threads : Kernel::threads);
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
  const Answer allowed = allow<Kernel>(grid.shared_bytes);
  check(allowed.error, allowed.call);
  const Launch<Kernel> launch(grid);
  MMIXER_CHECK(cudaLaunchKernelEx(&launch.configuration, entry<Kernel>, arguments));
}

// True where an error says nothing of the kernel and the device: it may be gone the next time, or
// stays with the process until its end (from 700 on), or is of a capture (from 900 on).
inline bool is_passing(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
    case cudaErrorInitializationError:
    case cudaErrorDevicesUnavailable:
    case cudaErrorSystemNotReady:
    case cudaErrorMpsConnectionFailed:
    case cudaErrorMpsServerNotReady: return true;
    default: return (error >= 700 && error < 720) || (error >= 900 && error < 910);
  }
}

// A device's answer that it cannot run a kernel, whichever error it chooses for that.
inline std::string refusal(const Answer& answer) {
  if (is_passing(answer.error)) check(answer.error, answer.call);
  cudaGetLastError();
  return std::string(answer.call) + ": " + cudaGetErrorString(answer.error);
}

// The reason why the current device cannot run a kernel of this build; empty where it can.
template <class Kernel>
std::string refusal() {
  cudaFuncAttributes attributes;
  const Answer answer = MMIXER_ANSWER(cudaFuncGetAttributes(&attributes, entry<Kernel>));
  if (answer.error == cudaSuccess) return "";
  const std::string general = refusal(answer);
  const auto version = [](int x) {
    return std::to_string(x / 1000) + "." + std::to_string(x % 1000 / 10);
  };
  int driver = 0, runtime = 0;
  if (answer.error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess &&
      cudaRuntimeGetVersion(&runtime) == cudaSuccess)
    return driver == 0 ? "there is no NVIDIA driver"
                       : "its driver serves CUDA " + version(driver) +
                             " at most, but this build is of CUDA " + version(runtime) +
                             ": update the driver, or install again with an older toolkit";
  // The second is the answer where the program has images, but none of this function.
  if (answer.error == cudaErrorNoKernelImageForDevice ||
      answer.error == cudaErrorInvalidDeviceFunction) {
    const std::string major = std::to_string(device_attribute(cudaDevAttrComputeCapabilityMajor)),
                      minor = std::to_string(device_attribute(cudaDevAttrComputeCapabilityMinor));
    return "this build has no kernels for its compute capability " + major + "." + minor +
           ": install again with " + major + minor + " in MMIXER_CUDA_ARCHS";
  }
  return general;
}

// The reason why the current device has no room for a block; empty where it has.
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
  if (const Answer answer = MMIXER_ANSWER(cudaFuncGetAttributes(&attributes, entry<Kernel>));
      answer.error)
    return {0, refusal(answer)};
  // The virtual architecture, and not the GPU, has decided what the kernel is.
  if (attributes.ptxVersion < 90)
    return {0,
            "of this build only PTX older than 9.0 serves this GPU: install again with 90 in "
            "MMIXER_CUDA_ARCHS"};
  if (const Answer answer = allow<Kernel>(shared_bytes); answer.error) return {0, refusal(answer)};
  const Launch<Kernel> launch({cluster, cluster, false, shared_bytes, nullptr});
  int count = 0;
  if (const Answer answer = MMIXER_ANSWER(
          cudaOccupancyMaxActiveClusters(&count, entry<Kernel>, &launch.configuration));
      answer.error)
    return {0, refusal(answer)};
  if (count == 0)
    return {0, "no cluster of " + std::to_string(cluster) + " blocks fits on this GPU"};
  return {count, ""};
}

inline int processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

template <class Kernel>
Resident resident_blocks(size_t shared_bytes) {
  if (!device_attribute(cudaDevAttrCooperativeLaunch))
    return {0, "this GPU has no cooperative launches"};
  if (const std::string room = without_room(shared_bytes); !room.empty()) return {0, room};
  if (const Answer answer = allow<Kernel>(shared_bytes); answer.error) return {0, refusal(answer)};
  int count = 0;
  if (const Answer answer = MMIXER_ANSWER(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, entry<Kernel>, Kernel::threads,
                                                        shared_bytes));
      answer.error)
    return {0, refusal(answer)};
  if (count == 0) return {0, "no block fits on a multiprocessor of this GPU"};
  return {count * processors(), ""};
}

// A stream's own number in this program. Its handle may have been another stream's before.
inline uint64_t number_of(void* stream) {
  unsigned long long number = 0;
  MMIXER_CHECK(cudaStreamGetId(static_cast<cudaStream_t>(stream), &number));
  return number;
}

inline void clear(void* p, size_t bytes, void* stream) {
  MMIXER_CHECK(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace mmixer::cuda

#else

#include "../emulator/launch.h"

#endif
