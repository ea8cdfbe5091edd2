// mmixer_kernels._native: addresses and sizes in, calls of csrc/ out. No logic, no torch.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../csrc/cpu/engine.h"
#include "../csrc/cpu/int8.h"
#include "../csrc/cpu/team.h"
#include "cuda.h"
#include "stream.h"
#include "workspace.h"

namespace py = pybind11;
using namespace mmixer;

namespace {

struct Cpu {
  struct Options {
    int threads;
    const void* packed;  // null for backward
  };
  static constexpr bool narrows = false;  // gradients have Problem::dtype

  static Problem with(Problem p, const Options& o) {
    p.threads = o.threads, p.packed = o.packed;
    return p;
  }

  static void check(const Problem& p) { cpu::check(p); }
  static int64_t saved_size(const Problem& p) { return cpu::saved_size(p); }
  static int64_t forward_workspace_size(const Problem& p, const Options& o) {
    return streams::bytes(cpu::forward_workspace_size(with(p, o)), p);
  }
  static int64_t backward_workspace_size(const Problem& p, const Options& o, bool need_weights) {
    return streams::bytes(cpu::backward_workspace_size(with(p, o), need_weights), p);
  }
  static Workspace workspace(PyObject*, int64_t bytes) { return Workspace(bytes); }
  static void forward(const Problem& p, const Options& o, const Results& results, void* saved,
                      void* workspace) {
    cpu::forward(with(p, o), results, saved, workspace);
  }
  static void backward(const Problem& p, const Options& o, const Cotangents& cotangents,
                       const void* saved, const GroupGradient* gradients, void* grad_hx,
                       void* workspace) {
    cpu::backward(with(p, o), cotangents, saved, gradients, grad_hx, workspace);
  }
};

struct Pack {
  int threads;
  py::handle call, tensors;
};

// Problem::packed of a call's weights, for others with the same.
py::object pack(const Pack& c) {
  const from_python::Items tensors(c.tensors.ptr());
  const OwnProblem own = from_python::problem(from_python::Form(c.call), tensors);
  const Problem p = Cpu::with(own.problem(), {c.threads, nullptr});
  py::object packed = passes::new_empty(tensors[0], nullptr, cpu::packed_size(p));
  void* const memory = passes::address(packed);
  {
    const py::gil_scoped_release release;
    cpu::pack(p, memory);
  }
  return packed;
}

}  // namespace

namespace fields {

template <>
Table<passes::Forward<Cpu>> describe() {
  using Struct = passes::Forward<Cpu>;
  return passes::describe_forward(Table<Struct>("forward"))
      .field("threads", &Struct::threads)
      .field("packed", &Struct::packed);
}

template <>
Table<passes::Backward<Cpu>> describe() {
  using Struct = passes::Backward<Cpu>;
  return passes::describe_backward(Table<Struct>("backward")).field("threads", &Struct::threads);
}

template <>
Table<Pack> describe() {
  return passes::describe_forward(Table<Pack>("pack")).field("threads", &Pack::threads);
}

}  // namespace fields

PYBIND11_MODULE(_native, m) {
  fields::add_call<passes::forward<Cpu>>(m);
  fields::add_call<passes::backward<Cpu>>(m);
  fields::add_call<pack>(m);
  py::class_<streams::Stream>(m, "_Stream", py::module_local()).def("step", &streams::Stream::step);
  fields::add_call<streams::open>(m);
  m.def("use_instruction_set", [](const std::string& name) {
    if (!cpu::use_instruction_set(name))
      throw py::value_error("this build or processor has no instruction set " + name);
  });
  m.def("team_size", &cpu::team_size, py::arg("multiplications"), py::arg("threads"));
  m.attr("multiplications_per_member") = cpu::multiplications_per_member;
#ifdef MMIXER_CUDA_BUILD
  py::module_ cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
#endif
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = MMIXER_COMPILER;
    info["build_type"] = MMIXER_BUILD_TYPE;
    info["instruction_sets"] = MMIXER_INSTRUCTION_SETS;
    info["instruction_sets_here"] = cpu::instruction_sets();
#ifdef MMIXER_OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#ifdef MMIXER_CUDA_BUILD
    info["cuda"] = MMIXER_CUDA_BUILD;
#else
    info["cuda"] = false;
#endif
    info["instruction_set"] = cpu::instruction_set();
    info["int8_set"] = cpu::int8_set();
    info["processors"] = cpu::available_processors();
    return info;
  });
}
