// A matrix product on a CPU, in plain loops.
#pragma once

#include "../cuda/products.h"

namespace mmixer::cuda::emulator {

// Counts the product and, if what is launched is to run, sums in float32, or in float64 for
// float64, as a device does.
void multiply(const Product& product, void* stream);

}  // namespace mmixer::cuda::emulator
