// The calls of csrc/cuda as Python functions: of mmixer_kernels._native.cuda, and of the tests'
// module over the emulator.
#pragma once

#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& m);
