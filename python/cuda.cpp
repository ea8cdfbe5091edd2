#include "cuda.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "../csrc/cuda/engine.h"
#include "../csrc/cuda/kernels.h"
#include "../csrc/cuda/products.h"
#include "problem.h"

namespace py = pybind11;
using namespace mmixer;
using namespace mmixer::cuda;

namespace {

struct PlanCall : Variant {
  int hidden;
  bool backward;
};

struct SavedSize {
  fields::Held<OwnProblem> problem;
};

struct ForwardWorkspaceSize {
  fields::Held<OwnProblem> problem;
  fields::Held<PassPlan> plan;
};

struct BackwardWorkspaceSize : ForwardWorkspaceSize {
  bool need_weights;
};

struct Forward {
  fields::Held<OwnProblem> problem;
  fields::Held<PassPlan> plan;
  void *output, *h_n, *saved, *workspace, *stream;
};

struct Backward {
  fields::Held<OwnProblem> problem;
  fields::Held<PassPlan> plan;
  py::handle cotangents;
  const void* saved;
  py::handle gradients;
  void *grad_hx, *workspace, *stream;
};

struct CellPlanCall : Problem, Group {};

struct CellCall {
  py::handle step;
  int team_samples, blocks;
  void *next_state, *workspace, *stream;
};

struct PrepareCall : PrepareArguments {
  std::vector<WeightSet> sets;
};

std::tuple<int, int, std::string> plan_call(const PlanCall& call) {
  const Plan p = plan(call, call.hidden, call.backward);
  return {p.H, p.teams, p.refusal};
}

int64_t saved_size_call(const SavedSize& call) { return saved_size(call.problem.value->problem()); }

int64_t forward_workspace_size_call(const ForwardWorkspaceSize& call) {
  return forward_workspace_size(call.problem.value->problem(), *call.plan.value);
}

int64_t backward_workspace_size_call(const BackwardWorkspaceSize& call) {
  return backward_workspace_size(call.problem.value->problem(), *call.plan.value,
                                 call.need_weights);
}

void forward_call(const Forward& call) {
  const py::gil_scoped_release release;
  forward(call.problem.value->problem(), *call.plan.value, call.output, call.h_n, call.saved,
          call.workspace, call.stream);
}

void backward_call(const Backward& call) {
  const Problem problem = call.problem.value->problem();
  const Cotangents cotangents = from_python::cotangents(call.cotangents, problem);
  const std::vector<GroupGradient> gradients =
      from_python::gradients(call.gradients, problem.groups);
  const py::gil_scoped_release release;
  backward(problem, *call.plan.value, cotangents, call.saved, gradients.data(), call.grad_hx,
           call.workspace, call.stream);
}

std::tuple<int, int, int64_t, std::string> cell_plan_call(const CellPlanCall& call) {
  const CellPlan p = cell_plan(call, call);
  return {p.team_samples, p.blocks, p.workspace, p.refusal};
}

void cell_call(const CellCall& call) {
  const CellPlan plan{call.team_samples, call.blocks, 0, ""};
  const from_python::OneStep one = from_python::step(call.step);
  cell(one, one, plan, call.next_state, call.workspace, call.stream);
}

void prepare_call(const PrepareCall& call) {
  PrepareArguments a = call;
  if (call.sets.size() > most_weight_sets) throw py::value_error("sets are too many");
  a.count = int(call.sets.size());
  for (int i = 0; i < a.count; i++) {
    std::copy_n(call.sets[i].weight + gate_r, step_gates, a.weight[i]);
    a.norm[i][0] = call.sets[i].norm_weight, a.norm[i][1] = call.sets[i].norm_bias;
  }
  prepare(a, nullptr);
}

}  // namespace

namespace fields {

template <>
struct Names<Path> {
  static constexpr const char* of[] = {"cluster", "cooperative", "wide", "step"};
};

#define FIELD(name) .field(#name, &Struct::name)
#define VARIANT FIELD(path) FIELD(samples) FIELD(terms) FIELD(term_dtype)

template <>
Table<PlanCall> describe() {
  using Struct = PlanCall;
  return Table<Struct>("plan") VARIANT FIELD(hidden) FIELD(backward);
}

template <>
Table<PassPlan> describe() {
  using Struct = PassPlan;
  return Table<Struct>("PassPlan") VARIANT FIELD(teams) FIELD(allow_tf32);
}

template <>
Table<SavedSize> describe() {
  using Struct = SavedSize;
  return Table<Struct>("saved_size") FIELD(problem);
}

template <>
Table<ForwardWorkspaceSize> describe() {
  using Struct = ForwardWorkspaceSize;
  return Table<Struct>("forward_workspace_size") FIELD(problem) FIELD(plan);
}

template <>
Table<BackwardWorkspaceSize> describe() {
  using Struct = BackwardWorkspaceSize;
  return Table<Struct>("backward_workspace_size") FIELD(problem) FIELD(plan) FIELD(need_weights);
}

template <>
Table<Forward> describe() {
  using Struct = Forward;
  return Table<Struct>("forward") FIELD(problem) FIELD(plan) FIELD(output) FIELD(h_n) FIELD(saved)
      FIELD(workspace) FIELD(stream);
}

template <>
Table<Backward> describe() {
  using Struct = Backward;
  return Table<Struct>("backward") FIELD(problem) FIELD(plan) FIELD(cotangents) FIELD(saved)
      FIELD(gradients) FIELD(grad_hx) FIELD(workspace) FIELD(stream);
}

template <>
Table<CellPlanCall> describe() {
  using Struct = CellPlanCall;
  return Table<Struct>("cell_plan") FIELD(batch) FIELD(input_size) FIELD(context_size) FIELD(hidden)
      FIELD(dtype) FIELD(weight_dtype);
}

template <>
Table<CellCall> describe() {
  using Struct = CellCall;
  return Table<Struct>("cell") FIELD(step) FIELD(team_samples) FIELD(blocks) FIELD(next_state)
      FIELD(workspace) FIELD(stream);
}

template <>
Table<WeightSet> describe() {
  Table<WeightSet> table("WeightSet");
  return add_weights(table);
}

// Of the kernel by itself, for tests.
template <>
Table<PrepareCall> describe() {
  using Struct = PrepareCall;
  return Table<Struct>("prepare") FIELD(sets) FIELD(first) FIELD(weight_dtype) FIELD(norm_dtype)
      FIELD(remove_mean) FIELD(transposed) FIELD(matrices) FIELD(matrices_dtype)
          FIELD(split_weights) FIELD(term_dtype) FIELD(norms) FIELD(G) FIELD(H) FIELD(Hp)
              FIELD(terms);
}

}  // namespace fields

void bind_cuda(py::module_& m) {
  bind_problem<check>(m);
  fields::add_struct<PassPlan>(m);
  fields::add_call<plan_call>(m);
  fields::add_call<saved_size_call>(m);
  fields::add_call<forward_workspace_size_call>(m);
  fields::add_call<backward_workspace_size_call>(m);
  fields::add_call<forward_call>(m);
  fields::add_call<backward_call>(m);
  fields::add_call<cell_plan_call>(m);
  fields::add_call<cell_call>(m);
  fields::add_struct<WeightSet>(m);
  fields::add_call<prepare_call>(m);
  m.def("refusal", [] { return refusal(); });
  m.def("product_library", product_library);
  m.def("product_fallbacks", product_fallbacks);
  m.def("stream_number",
        [](std::uintptr_t stream) { return stream_number(reinterpret_cast<void*>(stream)); });
}
