// A CUDA runtime that answers as a test tells it to, in place of the real one.
#pragma once

#include <cuda_runtime_api.h>

// Its answers, and the questions that it was asked.
struct Runtime {
  int device = 0, major = 9, minor = 0, ptx = 90, driver = 13000, multiprocessors = 132;
  int cooperative = 1, shared = 227 * 1024, clusters = 8, blocks = 1;
  cudaError_t attributes = cudaSuccess, set_attribute = cudaSuccess, occupancy = cudaSuccess;
  int set_calls = 0, launches = 0, most_shared = 0, cleared = 0;
  // The last launch, or the last question about one; threads are those per block.
  unsigned cluster = 0, cooperative_launch = 0, threads = 0;
  unsigned long long streams = 0;
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;  // of the thread
  int capture_modes = 0;                                             // how often it was changed
};

extern Runtime runtime;
