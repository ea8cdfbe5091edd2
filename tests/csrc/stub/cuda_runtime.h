// The part of the CUDA runtime that benchmarks/gpu_probe.cu needs, on a CPU: memory is the host's,
// kernels run by csrc/emulator have ended when their launch returns, and the environment variable
// STUB plants a fault:
//
//   hang     no event is ever reached
//   differ   every tenth copy from the device has another first byte
//   missing  there is no device
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>

enum cudaError_t { cudaSuccess, cudaErrorNotReady, cudaErrorNoDevice };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrClockRate };
enum { cudaEventDisableTiming };
using cudaEvent_t = int;

struct cudaDeviceProp {
  char name[64] = "a \"CPU\"";
  int major = 9, minor = 0, multiProcessorCount = 132;
  size_t l2CacheSize = size_t(50) << 20;
};

inline bool stub_is(const char* fault) {
  const char* const planted = std::getenv("STUB");
  return planted && std::string(planted) == fault;
}

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the stub"; }

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  if (stub_is("missing")) return cudaErrorNoDevice;
  *properties = {};
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1980000;
  return cudaSuccess;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }

inline cudaError_t cudaMalloc(void** p, size_t size) { return *p = std::malloc(size), cudaSuccess; }
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }

inline cudaError_t cudaMemset(void* p, int value, size_t size) {
  return std::memset(p, value, size), cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  static int copies = 0;
  std::memcpy(to, from, size);
  if (kind == cudaMemcpyDeviceToHost && ++copies % 10 == 0 && stub_is("differ"))
    *static_cast<unsigned char*>(to) ^= 1;
  return cudaSuccess;
}

inline cudaError_t cudaEventCreate(cudaEvent_t*) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, int) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) {
  return stub_is("hang") ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1, cudaSuccess;
}
