// csrc/cuda/products.h on a CPU: the loops, and the kernel of product_kernel.h.
#include "products.h"

#include "../../csrc/emulator/emulator.h"

int main() {
  int stream = 0;
  const Multiply multiply = [&](const Product& product) {
    mmixer::cuda::multiply(product, nullptr, &stream);
  };
  for (const bool kernel : {false, true}) {
    options().product_kernel = kernel;
    check_all(multiply);
    for (const int64_t rows : {3, 0})  // nothing to sum, and nothing to do
      check({2, rows, 4, 0, false, false, false, 1, Dtype::float32, Dtype::float32}, multiply);
  }
  options().resident_blocks = 1;  // a block has more than one tile
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float32})
    check({9, 65, 10, 33, false, false, false, 3, dtype, Dtype::float32}, multiply);
  for (const bool kernel : {false, true}) {
    options() = Options();
    options().product_kernel = kernel, options().run = false;
    const float one = 1;
    float result = 7;
    clear_launches();
    const Operand operand{&one, 1, 0, false};
    multiply({1, 1, 1, 1, operand, operand, Dtype::float32, &result, 1, 0, Dtype::float32, false});
    const std::string name = kernel ? "ProductKernel" : "product";
    if (result != 7 || launches() != std::map<std::string, int64_t>{{name, 1}} ||
        streams() != std::set<void*>{&stream}) {
      std::printf("FAILED: %s must be counted, with its stream, and not run\n", name.c_str());
      failures++;
    }
  }
  if (failures == 0) std::printf("all products are right\n");
  return failures != 0;
}
