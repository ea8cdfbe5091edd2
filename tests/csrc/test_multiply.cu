// csrc/cuda/products.cu's choice, by runtime_stub.cpp and cublaslt_stub.cpp without a GPU.
//
//   test_multiply           without cuBLASLt
//   test_multiply LIBRARY   with the stub
#include <dlfcn.h>

#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cuda/products.h"
#include "cublaslt_stub.h"
#include "runtime_stub.h"

using namespace mmixer;
using namespace mmixer::cuda;

namespace {

int failures = 0;

void check(bool holds, const std::string& what) {
  if (!holds) std::printf("FAILED: %s\n", what.c_str()), failures++;
}

Product product(const float* a, float* result) {
  return {1,
          2,
          2,
          2,
          {a, 2, 0, false},
          {a, 2, 0, true},
          Dtype::float32,
          result,
          2,
          0,
          Dtype::float32,
          false};
}

void without_library() {
  const float a[] = {1, 2, 3, 4};
  float result[4];
  check(product_library() == "own kernel: no libcublasLt is loaded", product_library());
  for (int launches = 1; launches < 3; launches++) {
    multiply(product(a, result), nullptr, nullptr);
    check(runtime.launches == launches && runtime.threads == 256, "the own kernel is launched");
  }
  check(product_fallbacks().empty(), "no product is told, as all are the own kernel's");
}

void with_library(Stub& stub) {
  const float a[] = {1, 2, 3, 4};
  float result[4] = {};
  check(product_library() == "cuBLASLt 12.13.14", product_library());
  static cudaStreamCaptureMode mode;  // in which the product was made
  stub.at_matmul = [] { mode = runtime.capture_mode; };
  multiply(product(a, result), nullptr, nullptr);
  check(std::vector<float>(result, result + 4) == std::vector<float>{5, 11, 11, 25}, "the product");
  check(mode == cudaStreamCaptureModeRelaxed && runtime.capture_modes == 2 &&
            runtime.capture_mode == cudaStreamCaptureModeGlobal,
        "the first product of a shape may be in a capture");
  runtime.device = 1;
  multiply(product(a, result), nullptr, nullptr);
  check(stub.calls["Create"] == 2, "each device has its handle");
  multiply(product(a, result), nullptr, nullptr);
  check(stub.calls["MatmulAlgoGetHeuristic"] == 2 && runtime.capture_modes == 4 &&
            mode == cudaStreamCaptureModeGlobal,
        "a repeated one");
  check(runtime.launches == 0 && product_fallbacks().empty(), "the own kernel is not launched");
  Product expanded = product(a, result);
  expanded.a.stride = 0;
  multiply(expanded, nullptr, nullptr);
  check(runtime.launches == 1 && product_fallbacks().size() == 1, "what the library does not take");
}

}  // namespace

int main(int count, char** words) {
  if (count == 1) {
    without_library();
  } else {
    void* const library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
    with_library(*reinterpret_cast<Stub* (*)()>(dlsym(library, "cublaslt_stub"))());
  }
  if (failures == 0) std::printf("all choices are right\n");
  return failures != 0;
}
