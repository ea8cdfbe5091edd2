// A CUDA runtime whose answers a test plants, in the place of the real one.
#pragma once

#include <cuda_runtime_api.h>

// What it answers, and what it was asked.
struct Runtime {
  int device = 0, major = 9, minor = 0, ptx = 90, driver = 13000, multiprocessors = 132;
  int cooperative = 1, shared = 227 * 1024, clusters = 8, blocks = 1;
  cudaError_t attributes = cudaSuccess, set_attribute = cudaSuccess, occupancy = cudaSuccess;
  int set_calls = 0, launches = 0, most_shared = 0, cleared = 0;
  unsigned cluster = 0, cooperative_launch = 0;  // of the last launch, or question about one
  unsigned threads = 0;                          // of a block, likewise
  unsigned long long streams = 0;
};

extern Runtime runtime;
