// A Python module of the CUDA engine's calls over the emulator: the kernels run on this CPU.
#include <pybind11/stl.h>

#include "../../csrc/emulator/emulator.h"
#include "../../python/cuda.h"

namespace py = pybind11;
using mmixer::cuda::Options;
using mmixer::cuda::options;

PYBIND11_MODULE(_emulated, m) {
  bind_cuda(m);
  m.def(
      "configure",
      [](uint64_t seed, bool adversarial, int resident_clusters, int resident_blocks, bool run,
         bool product_kernel) {
        options() = {};
        options().seed = seed;
        options().schedule =
            adversarial ? Options::Schedule::adversarial : Options::Schedule::random;
        options().resident_clusters = resident_clusters;
        options().resident_blocks = resident_blocks;
        options().run = run;
        options().product_kernel = product_kernel;
      },
      py::arg("seed") = 1, py::arg("adversarial") = false, py::arg("resident_clusters") = 8,
      py::arg("resident_blocks") = 132, py::arg("run") = true, py::arg("product_kernel") = false);
  m.def("launches", mmixer::cuda::launches);
  m.def("streams", [] {
    std::set<uintptr_t> handles;
    for (void* const stream : mmixer::cuda::streams())
      handles.insert(reinterpret_cast<uintptr_t>(stream));
    return handles;
  });
  m.def("clear_launches", mmixer::cuda::clear_launches);
}
