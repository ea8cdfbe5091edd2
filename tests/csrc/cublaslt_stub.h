// A cuBLASLt that multiplies on this CPU and tells what it was asked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

struct Stub {
  std::map<std::string, int> calls;  // by the functions' names, without cublasLt
  int objects = 0;                   // that were made and not destroyed
  std::string failing;               // the function that fails with this status
  int status = 14;
  int algorithms = 1;  // that the heuristic finds
  std::map<int, uint64_t> preference;
  int compute_type = 0, scale_type = 0;
  void *workspace = nullptr, *stream = nullptr;
  size_t workspace_bytes = 0;
  void (*at_matmul)() = nullptr;  // called by each Matmul
};

extern "C" Stub* cublaslt_stub();
