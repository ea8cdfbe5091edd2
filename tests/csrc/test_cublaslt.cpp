// csrc/cuda/cublaslt.h and a library that the process has loaded.
//
//   test_cublaslt                  without one
//   test_cublaslt LIBRARY          with cublaslt_stub.cpp, under a file name of its own
//   test_cublaslt LIBRARY global   the same, where its symbols are global
//   test_cublaslt LIBRARY refusal  prints why the library cannot be used
//   test_cublaslt LIBRARY device   prints its version and the error of a product's preparation
#include <dlfcn.h>

#include <stdexcept>

#include "../../csrc/cuda/cublaslt.h"
#include "cublaslt_stub.h"
#include "products.h"

namespace {

Stub* stub = nullptr;

void expect(bool holds, const std::string& what) {
  if (!holds) std::printf("FAILED: %s\n", what.c_str()), failures++;
}

bool multiply(const Product& product, int device = 0) {
  auto matmul = cublaslt::find(device, product);
  if (!matmul) matmul = cublaslt::make(device, product);
  return cublaslt::multiply(*matmul, product, &stub->workspace, &stub->stream);
}

alignas(256) float memory[4096];

Product square(int64_t size) {
  const Operand operand{memory, size, 0, false};
  return {2,    size,        size,           size, operand, operand, Dtype::float32, memory + 2048,
          size, size * size, Dtype::float32, false};
}

template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void check_queries() {
  auto& queries = stub->calls["MatmulAlgoGetHeuristic"];
  const auto asks = [&](const Product& product, int device = 0) {
    const int before = queries;
    multiply(product, device);
    return queries - before;
  };
  Product x = square(8);
  expect(asks(x) == 1 && asks(x) == 0 && asks(x) == 0, "one query per shape");
  expect(stub->preference == std::map<int, uint64_t>{{1, product_workspace_bytes},
                                                     {3, 2},
                                                     {5, 256},
                                                     {6, 256},
                                                     {7, 256},
                                                     {8, 256}},
         "the preferences");
  expect(stub->workspace == &stub->workspace && stub->stream == &stub->stream &&
             stub->workspace_bytes == product_workspace_bytes,
         "workspace and stream are handed on");
  expect(stub->compute_type == 68 && stub->scale_type == 0, "float32");
  x.allow_tf32 = true;
  expect(asks(x) == 1 && stub->compute_type == 77, "TF32");
  x.a.p = memory + 1;
  expect(asks(x) == 1 && stub->preference[5] == 256 && stub->preference[6] == 4, "alignment of a");
  x.a.p = memory + 3;
  expect(asks(x) == 0, "another address of the same alignment");
  x.b.p = memory + 4;
  expect(asks(x) == 1 && stub->preference[5] == 16, "alignment of b");
  x.b.stride = 9;
  expect(asks(x) == 1, "stride");
  expect(stub->calls["Create"] == 1 && asks(x, 1) == 1 && asks(x, 1) == 0 &&
             stub->calls["Create"] == 2,
         "one handle per device");
  for (int64_t stride = 9; stride < 9 + 3 * 4096; stride++)
    x.b.stride = stride, x.rows = x.columns = x.inner = 1, multiply(x);
  expect(stub->objects <= 4 * 4096, "what is kept is bounded");
}

void check_failures() {
  for (const char* const call :
       {"MatmulDescCreate", "MatmulDescSetAttribute", "MatrixLayoutCreate",
        "MatrixLayoutSetAttribute", "MatmulPreferenceCreate", "MatmulPreferenceSetAttribute",
        "MatmulAlgoGetHeuristic", "Matmul", "Create"}) {
    const int objects = stub->objects;
    stub->failing = call;
    const bool creates = std::string(call) == "Create";  // only a device's first product does
    const std::string error = error_of([&] { multiply(square(11), creates ? 7 : 0); });
    expect(has(error,
               std::string("cublasLt") + call + " failed with status 14 (the stub's words)") &&
               has(error, "2 x [11, 11] [11, 11] in float32 to float32"),
           std::string(call) + ": " + error);
    stub->failing.clear();
    expect(std::string(call) == "Matmul" || stub->objects == objects, "all is freed");
  }
  expect(multiply(square(11)), "a failure is not kept");
}

void check_refused_products() {
  expect(cublaslt::refused_products().empty(), "nothing is refused");
  stub->algorithms = 0;
  expect(!multiply(square(12)) && !multiply(square(12)), "no algorithm");
  stub->algorithms = 1;
  expect(!multiply(square(12)), "an answer is kept");
  stub->failing = "MatmulAlgoGetHeuristic", stub->status = 15;
  expect(!multiply(square(13)), "not supported");
  stub->failing.clear();
  Product overlapping = square(5);
  overlapping.a.stride = 0;
  expect(!multiply(overlapping), "expanded rows");
  const std::vector<std::string> refused = cublaslt::refused_products();
  expect(refused.size() == 3 && has(refused[0], "[12, 12]") && has(refused[0], "no algorithm") &&
             has(refused[1], "status 15 (the stub's words)") && has(refused[2], "overlap"),
         "the refused products");
}

}  // namespace

int main(int count, char** words) {
  const std::string mode = count > 2 ? words[2] : "";
  void* library = nullptr;
  if (count > 1 &&
      !(library = dlopen(words[1], RTLD_NOW | (mode == "global" ? RTLD_GLOBAL : RTLD_LOCAL)))) {
    std::printf("%s\n", dlerror());
    return 2;
  }
  const std::string refusal = cublaslt::refusal();
  if (count == 1 || mode == "refusal") return std::printf("%s\n", refusal.c_str()), 0;
  expect(refusal.empty(), refusal);
  if (failures) return 1;
  if (mode == "device") {
    std::printf("%s\n", cublaslt::version().c_str());
    const std::string error = error_of([] { cublaslt::make(0, square(4)); });
    return std::printf("%s\n", error.c_str()), 0;
  }
  stub = reinterpret_cast<Stub* (*)()>(dlsym(library, "cublaslt_stub"))();
  expect(cublaslt::version() == "12.13.14", "the version is " + cublaslt::version());
  check_all([](const Product& product) { expect(multiply(product), "a product is not taken"); });
  check_queries();
  check_failures();
  check_refused_products();
  if (failures == 0) std::printf("all products are right\n");
  return failures != 0;
}
