// csrc/cuda/products.h on a CPU: the loops, and the kernel of product_kernel.h.
#include "products.h"

#include "../../csrc/emulator/emulator.h"

int main() {
  const Multiply multiply = [](const Product& product) {
    mmixer::cuda::multiply(product, nullptr, nullptr);
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
  if (failures == 0) std::printf("all products are right\n");
  return failures != 0;
}
