#include "cuda.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "../csrc/cuda/engine.h"
#include "../csrc/cuda/kernels.h"
#include "../csrc/cuda/products.h"
#include "pass.h"

namespace py = pybind11;
using namespace mmixer;
using namespace mmixer::cuda;

namespace {

struct PlanCall : Variant {
  int hidden;
  bool backward;
};

struct Cuda {
  struct Options {
    fields::Held<PassPlan> plan;
    void* stream;
  };
  static constexpr bool narrows = true;  // the weights' gradients have the weights' dtypes

  static void check(const Problem& p) { cuda::check(p); }
  static int64_t saved_size(const Problem& p) { return cuda::saved_size(p); }
  static int64_t forward_workspace_size(const Problem& p, const Options& o) {
    return cuda::forward_workspace_size(p, *o.plan.value);
  }
  static int64_t backward_workspace_size(const Problem& p, const Options& o, bool need_weights) {
    return cuda::backward_workspace_size(p, *o.plan.value, need_weights);
  }
  static passes::TorchMemory workspace(PyObject* like, int64_t bytes) { return {like, bytes}; }
  static void forward(const Problem& p, const Options& o, const Results& results, void* saved,
                      void* workspace) {
    cuda::forward(p, *o.plan.value, results, saved, workspace, o.stream);
  }
  static void backward(const Problem& p, const Options& o, const Cotangents& cotangents,
                       const void* saved, const GroupGradient* gradients, void* grad_hx,
                       void* workspace) {
    cuda::backward(p, *o.plan.value, cotangents, saved, gradients, grad_hx, workspace, o.stream);
  }
};

struct CellPlanCall : Problem, Group {};

struct CellCall {
  py::handle call, tensors;
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

std::tuple<int, int, int64_t, std::string> cell_plan_call(const CellPlanCall& call) {
  const CellPlan p = cell_plan(call, call);
  return {p.team_samples, p.blocks, p.workspace, p.refusal};
}

void cell_call(const CellCall& call) {
  const CellPlan plan{call.team_samples, call.blocks, 0, ""};
  const from_python::Form form(call.call);
  from_python::require(form.layout == fields::Layout::step, "layout", "be step");
  const OwnProblem own = from_python::problem(form, from_python::Items(call.tensors.ptr()));
  cell(own, own.list[0], plan, call.next_state, call.workspace, call.stream);
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
Table<passes::Forward<Cuda>> describe() {
  using Struct = passes::Forward<Cuda>;
  return passes::describe_forward(Table<Struct>("forward")) FIELD(plan) FIELD(stream);
}

template <>
Table<passes::Backward<Cuda>> describe() {
  using Struct = passes::Backward<Cuda>;
  return passes::describe_backward(Table<Struct>("backward")) FIELD(plan) FIELD(stream);
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
  return Table<Struct>("cell") FIELD(call) FIELD(tensors) FIELD(team_samples) FIELD(blocks)
      FIELD(next_state) FIELD(workspace) FIELD(stream);
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
  fields::add_struct<PassPlan>(m);
  fields::add_call<plan_call>(m);
  fields::add_call<passes::forward<Cuda>>(m);
  fields::add_call<passes::backward<Cuda>>(m);
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
