// mmixer_kernels._native: addresses and sizes in, calls of csrc/ out. No logic, no torch.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../csrc/cpu/engine.h"
#include "../csrc/cpu/team.h"
#include "cuda.h"
#include "problem.h"

namespace py = pybind11;
using namespace mmixer;

namespace {

struct ForwardWorkspaceSize {
  fields::Held<OwnProblem> problem;
};

struct BackwardWorkspaceSize {
  fields::Held<OwnProblem> problem;
  bool need_weights;
};

struct Forward {
  fields::Held<OwnProblem> problem;
  void *output, *h_n, *saved, *workspace;
};

struct Backward : Cotangents {
  fields::Held<OwnProblem> problem;
  const void* saved;
  std::vector<GroupGradient> gradients;
  void *grad_hx, *workspace;
};

struct StepWorkspaceSize {
  Dtype dtype;
  int64_t batch, hidden;
};

struct Step : Problem, Group {
  void *next_state, *workspace;
};

int64_t forward_workspace_size(const ForwardWorkspaceSize& call) {
  return cpu::forward_workspace_size(call.problem.value->problem());
}

int64_t backward_workspace_size(const BackwardWorkspaceSize& call) {
  return cpu::backward_workspace_size(call.problem.value->problem(), call.need_weights);
}

void forward(const Forward& call) {
  const py::gil_scoped_release release;
  cpu::forward(call.problem.value->problem(), call.output, call.h_n, call.saved, call.workspace);
}

void backward(const Backward& call) {
  const Problem problem = call.problem.value->problem();
  if (int64_t(call.gradients.size()) != problem.groups)
    throw py::value_error("gradients must have one entry per weight set");
  const py::gil_scoped_release release;
  cpu::backward(problem, call, call.saved, call.gradients.data(), call.grad_hx, call.workspace);
}

int64_t step_workspace_size(const StepWorkspaceSize& call) {
  return cpu::step_workspace_size(call.dtype, call.batch, call.hidden);
}

void step(const Step& call) {
  const py::gil_scoped_release release;
  cpu::step(call, call, call.next_state, call.workspace);
}

}  // namespace

namespace fields {

template <>
Table<ForwardWorkspaceSize> describe() {
  return Table<ForwardWorkspaceSize>("forward_workspace_size")
      .field("problem", &ForwardWorkspaceSize::problem);
}

template <>
Table<BackwardWorkspaceSize> describe() {
  return Table<BackwardWorkspaceSize>("backward_workspace_size")
      .field("problem", &BackwardWorkspaceSize::problem)
      .field("need_weights", &BackwardWorkspaceSize::need_weights);
}

template <>
Table<Forward> describe() {
  return Table<Forward>("forward")
      .field("problem", &Forward::problem)
      .field("output", &Forward::output)
      .field("h_n", &Forward::h_n)
      .field("saved", &Forward::saved)
      .field("workspace", &Forward::workspace);
}

template <>
Table<Backward> describe() {
  Table<Backward> table("backward");
  return add_cotangents(table.field("problem", &Backward::problem))
      .field("saved", &Backward::saved)
      .field("gradients", &Backward::gradients)
      .field("grad_hx", &Backward::grad_hx)
      .field("workspace", &Backward::workspace);
}

template <>
Table<StepWorkspaceSize> describe() {
  return Table<StepWorkspaceSize>("step_workspace_size")
      .field("dtype", &StepWorkspaceSize::dtype)
      .field("batch", &StepWorkspaceSize::batch)
      .field("hidden", &StepWorkspaceSize::hidden);
}

template <>
Table<Step> describe() {
  Table<Step> table("step");
  return add_step(table)
      .field("threads", &Step::threads)
      .field("next_state", &Step::next_state)
      .field("workspace", &Step::workspace);
}

}  // namespace fields

PYBIND11_MODULE(_native, m) {
  fields::bind_problem(m);
  fields::add_call<forward_workspace_size>(m);
  fields::add_call<backward_workspace_size>(m);
  fields::add_call<forward>(m);
  fields::add_call<backward>(m);
  fields::add_call<step_workspace_size>(m);
  fields::add_call<step>(m);
  m.def("use_instruction_set", [](const std::string& name) {
    if (!cpu::use_instruction_set(name))
      throw py::value_error("this build or processor has no instruction set " + name);
  });
#ifdef MMIXER_CUDA_BUILD
  py::module_ cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
  for (const char* name : {"Group", "GroupGradient", "Problem"}) cuda.attr(name) = m.attr(name);
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
    info["processors"] = cpu::available_processors();
    return info;
  });
}
