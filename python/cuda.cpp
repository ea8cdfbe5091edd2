#include "cuda.h"

#include <pybind11/stl.h>

#include <tuple>

#include "../csrc/cuda/engine.h"
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

template <class Arguments>
struct Recurrence : Variant {
  int teams;
  fields::Held<Arguments> arguments;
  void* stream;
};

struct CellPlanCall : Problem, Group {};

struct CellCall {
  py::handle step;
  int team_samples, blocks;
  void *next_state, *workspace, *stream;
};

std::tuple<int, int, int64_t, std::string> plan_call(const PlanCall& call) {
  const Plan p = plan(call, call.hidden, call.backward);
  return {p.H, p.teams, p.packets, p.refusal};
}

void forward_call(const Recurrence<ForwardArguments>& call) {
  forward(call, call.teams, *call.arguments.value, call.stream);
}

void backward_call(const Recurrence<BackwardArguments>& call) {
  backward(call, call.teams, *call.arguments.value, call.stream);
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

}  // namespace

namespace fields {

template <>
struct Names<Path> {
  static constexpr const char* of[] = {"cluster", "cooperative", "wide"};
};

#define FIELD(name) .field(#name, &Struct::name)
#define OPTIONAL(name) .field(#name, &Struct::name, true)
#define SIZES FIELD(G) FIELD(T) FIELD(B) FIELD(H)
#define VARIANT FIELD(path) FIELD(samples) FIELD(terms) FIELD(term_dtype)

template <>
Table<PlanCall> describe() {
  using Struct = PlanCall;
  return Table<Struct>("plan") VARIANT FIELD(hidden) FIELD(backward);
}

template <>
Table<Recurrence<ForwardArguments>> describe() {
  using Struct = Recurrence<ForwardArguments>;
  return Table<Struct>("forward") VARIANT FIELD(teams) FIELD(arguments) FIELD(stream);
}

template <>
Table<Recurrence<BackwardArguments>> describe() {
  using Struct = Recurrence<BackwardArguments>;
  return Table<Struct>("backward") VARIANT FIELD(teams) FIELD(arguments) FIELD(stream);
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

template <>
Table<PrepareArguments> describe() {
  using Struct = PrepareArguments;
  return Table<Struct>("PrepareArguments")
      .list<&Struct::set, &Struct::count>("sets") FIELD(first) FIELD(weight_dtype) FIELD(norm_dtype)
          FIELD(remove_mean) FIELD(transposed) FIELD(matrices) FIELD(matrices_dtype)
              FIELD(split_weights) FIELD(term_dtype) FIELD(norms) FIELD(G) FIELD(H) FIELD(Hp)
                  FIELD(terms);
}

template <>
Table<ForwardArguments> describe() {
  using Struct = ForwardArguments;
  return Table<Struct>("ForwardArguments") SIZES FIELD(norms) FIELD(hx) FIELD(lengths) FIELD(eps)
      FIELD(weights) FIELD(input_gates) FIELD(states) FIELD(packets);
}

// In the order of G, T and B.
#define GRAD_OUTPUT                                                                    \
  FIELD(grad_output)                                                                   \
  FIELD(grad_output_dtype)                                                             \
      .field("grad_output_stride_group", &Struct::grad_output_stride, &Strides::group) \
      .field("grad_output_stride_step", &Struct::grad_output_stride, &Strides::step)   \
      .field("grad_output_stride_sample", &Struct::grad_output_stride, &Strides::sample)

template <>
Table<BackwardArguments> describe() {
  using Struct = BackwardArguments;
  return Table<Struct>("BackwardArguments") SIZES FIELD(norms) FIELD(hx) FIELD(lengths)
      FIELD(states) FIELD(x_hat) FIELD(r_std) GRAD_OUTPUT FIELD(grad_gates) FIELD(grad_f_tilde)
          FIELD(grad_norm) FIELD(grad_h_n) FIELD(grad_hx) FIELD(weights) FIELD(projected)
              FIELD(packets) FIELD(grad_gates_dtype);
}

#define ROWS FIELD(G) FIELD(rows) FIELD(H) FIELD(blocks) FIELD(norms) FIELD(eps)

template <>
Table<NormTanhArguments> describe() {
  using Struct = NormTanhArguments;
  return Table<Struct>("NormTanhArguments") ROWS FIELD(a) FIELD(y) FIELD(y_dtype) FIELD(gate);
}

template <>
Table<NormTanhBackwardArguments> describe() {
  using Struct = NormTanhBackwardArguments;
  return Table<Struct>("NormTanhBackwardArguments") ROWS FIELD(a) FIELD(gate) FIELD(grad_y)
      FIELD(grad_y_more) FIELD(grad_a) FIELD(grad_a_dtype) FIELD(grad_norm);
}

template <>
Table<MixArguments> describe() {
  using Struct = MixArguments;
  return Table<Struct>("MixArguments") ROWS FIELD(samples) FIELD(a) FIELD(context) FIELD(f_bar)
      FIELD(g_bar) FIELD(dtype) FIELD(mix) OPTIONAL(f_tilde) OPTIONAL(grad_f_tilde) OPTIONAL(grad_a)
          OPTIONAL(grad_f_bar) OPTIONAL(grad_g_bar) OPTIONAL(grad_norm);
}

template <>
Table<GateArguments> describe() {
  using Struct = GateArguments;
  return Table<Struct>("GateArguments") SIZES FIELD(norms) FIELD(hx) FIELD(lengths) FIELD(steps)
      FIELD(states) FIELD(dtype) FIELD(eps) FIELD(input_gates) FIELD(state_gates) FIELD(r_h)
          OPTIONAL(first_step) OPTIONAL(candidate) OPTIONAL(operand) OPTIONAL(f_tilde)
              OPTIONAL(x_hat) OPTIONAL(x_hat_operand) OPTIONAL(r_std) OPTIONAL(f_tilde_h)
                  OPTIONAL(f_tilde_r_h);
}

template <>
Table<GateBackwardArguments> describe() {
  using Struct = GateBackwardArguments;
  return Table<Struct>("GateBackwardArguments") SIZES FIELD(norms) FIELD(hx) FIELD(lengths)
      FIELD(states) FIELD(x_hat) FIELD(r_std) GRAD_OUTPUT FIELD(grad_gates) FIELD(grad_f_tilde)
          FIELD(grad_norm) FIELD(dtype) FIELD(carry) FIELD(grad_h) FIELD(step) OPTIONAL(grad_r_h)
              OPTIONAL(grad_sum);
}

}  // namespace fields

namespace {

// m.NAME(arguments, stream)
template <class Arguments>
void add_kernel(py::module_& m, const char* name, void (*call)(const Arguments&, void*)) {
  m.def(name, [call](const fields::Filled<Arguments>& arguments, std::uintptr_t stream) {
    call(fields::complete(arguments), reinterpret_cast<void*>(stream));
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  fields::add_struct<WeightSet>(m);
  fields::add_struct<PrepareArguments>(m);
  fields::add_struct<ForwardArguments>(m);
  fields::add_struct<BackwardArguments>(m);
  fields::add_struct<NormTanhArguments>(m);
  fields::add_struct<NormTanhBackwardArguments>(m);
  fields::add_struct<MixArguments>(m);
  fields::add_struct<GateArguments>(m);
  fields::add_struct<GateBackwardArguments>(m);
  fields::add_call<plan_call>(m);
  fields::add_call<forward_call>(m);
  fields::add_call<backward_call>(m);
  fields::add_call<cell_plan_call>(m);
  fields::add_call<cell_call>(m);
  add_kernel(m, "prepare", prepare);
  add_kernel(m, "norm_tanh", norm_tanh);
  add_kernel(m, "norm_tanh_backward", norm_tanh_backward);
  add_kernel<MixArguments>(m, "mix", mix);
  add_kernel(m, "mix_backward", mix_backward);
  add_kernel(m, "reset_gate", reset_gate);
  add_kernel(m, "update_gate", update_gate);
  add_kernel(m, "update_gate_backward", update_gate_backward);
  add_kernel(m, "reset_gate_backward", reset_gate_backward);
  m.attr("most_weight_sets") = most_weight_sets;
  m.def("refusal", [] { return refusal(); });
  m.def("product_library", product_library);
  m.def("product_fallbacks", product_fallbacks);
  m.def("stream_number",
        [](std::uintptr_t stream) { return stream_number(reinterpret_cast<void*>(stream)); });
}
