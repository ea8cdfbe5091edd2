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

struct SavedSize {
  fields::Held<OwnProblem> problem;
};

struct ForwardWorkspaceSize {
  fields::Held<OwnProblem> problem;
};

struct BackwardWorkspaceSize {
  fields::Held<OwnProblem> problem;
  bool need_weights;
};

struct Forward {
  fields::Held<OwnProblem> problem;
  int threads;
  void *output, *h_n, *saved, *workspace;
};

struct Backward {
  fields::Held<OwnProblem> problem;
  int threads;
  py::handle cotangents;
  const void* saved;
  py::handle gradients;
  void *grad_hx, *workspace;
};

struct StepWorkspaceSize {
  Dtype dtype;
  int64_t batch, hidden;
};

struct Step {
  py::handle step;
  int threads;
  void *next_state, *workspace;
};

int64_t saved_size(const SavedSize& call) { return cpu::saved_size(call.problem.value->problem()); }

// The bytes of so many elements of a Problem's dtype, which the CPU engine counts its memory in.
int64_t bytes(int64_t elements, Dtype dtype) {
  return elements * (dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
}

int64_t forward_workspace_size(const ForwardWorkspaceSize& call) {
  const Problem problem = call.problem.value->problem();
  return bytes(cpu::forward_workspace_size(problem), problem.dtype);
}

int64_t backward_workspace_size(const BackwardWorkspaceSize& call) {
  const Problem problem = call.problem.value->problem();
  return bytes(cpu::backward_workspace_size(problem, call.need_weights), problem.dtype);
}

// The Problem of a call with its threads.
template <class Call>
Problem problem_of(const Call& call) {
  Problem problem = call.problem.value->problem();
  problem.threads = call.threads;
  return problem;
}

void forward(const Forward& call) {
  const Problem problem = problem_of(call);
  const py::gil_scoped_release release;
  cpu::forward(problem, call.output, call.h_n, call.saved, call.workspace);
}

void backward(const Backward& call) {
  const Problem problem = problem_of(call);
  const Cotangents cotangents = from_python::cotangents(call.cotangents, problem);
  const std::vector<GroupGradient> gradients =
      from_python::gradients(call.gradients, problem.groups);
  const py::gil_scoped_release release;
  cpu::backward(problem, cotangents, call.saved, gradients.data(), call.grad_hx, call.workspace);
}

int64_t step_workspace_size(const StepWorkspaceSize& call) {
  return bytes(cpu::step_workspace_size(call.dtype, call.batch, call.hidden), call.dtype);
}

void step(const Step& call) {
  from_python::OneStep one = from_python::step(call.step);
  one.threads = call.threads;
  const py::gil_scoped_release release;
  cpu::step(one, one, call.next_state, call.workspace);
}

}  // namespace

namespace fields {

template <>
Table<SavedSize> describe() {
  return Table<SavedSize>("saved_size").field("problem", &SavedSize::problem);
}

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
      .field("threads", &Forward::threads)
      .field("output", &Forward::output)
      .field("h_n", &Forward::h_n)
      .field("saved", &Forward::saved)
      .field("workspace", &Forward::workspace);
}

template <>
Table<Backward> describe() {
  return Table<Backward>("backward")
      .field("problem", &Backward::problem)
      .field("threads", &Backward::threads)
      .field("cotangents", &Backward::cotangents)
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
  return Table<Step>("step")
      .field("step", &Step::step)
      .field("threads", &Step::threads)
      .field("next_state", &Step::next_state)
      .field("workspace", &Step::workspace);
}

}  // namespace fields

PYBIND11_MODULE(_native, m) {
  bind_problem<cpu::check>(m);
  fields::add_call<saved_size>(m);
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
