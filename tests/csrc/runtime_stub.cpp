// The host's compiler compiles this file: in nvcc's the runtime's functions are the device's too.
#include "runtime_stub.h"

#include <cstdio>
#include <utility>

Runtime runtime;

static void read(const cudaLaunchConfig_t& configuration) {
  runtime.cluster = runtime.cooperative_launch = 0;
  runtime.threads = configuration.blockDim.x;
  for (unsigned i = 0; i < configuration.numAttrs; i++) {
    const cudaLaunchAttribute& attribute = configuration.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      runtime.cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeCooperative)
      runtime.cooperative_launch = unsigned(attribute.val.cooperative);
  }
}

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = runtime.device, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return runtime.cleared++, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  static char text[32];
  std::snprintf(text, sizeof text, "error %d", int(error));
  return text;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = runtime.driver, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = runtime.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = runtime.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = runtime.shared; break;
    case cudaDevAttrCooperativeLaunch: *value = runtime.cooperative; break;
    case cudaDevAttrMultiProcessorCount: *value = runtime.multiprocessors; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = runtime.ptx;
  return runtime.attributes;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  runtime.set_calls++;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) runtime.most_shared = value;
  return runtime.set_attribute;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* c) {
  read(*c);
  return *count = runtime.clusters, runtime.occupancy;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  return *count = runtime.blocks, runtime.occupancy;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int,
                                                                   size_t, unsigned) {
  return *count = runtime.blocks, runtime.occupancy;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) {
  read(*c);
  return runtime.launches++, cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* number) {
  return *number = ++runtime.streams, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, runtime.capture_mode);
  return runtime.capture_modes++, cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }

// nvcc's own code calls these at the start of a program, and refers to them in a kernel's stub.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*,
                            void*, int*) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorInvalidValue;
}
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorInvalidValue;
}
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorInvalidValue; }
}
