#include "cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "../csrc/cuda/engine.h"

namespace py = pybind11;
using namespace mmixer::cuda;

namespace {

using Address = std::uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

// A field as an attribute: pointers as addresses, enumerations as their numbers.
template <class Arguments, class Owner, class Field>
void attribute(py::class_<Arguments>& type, const char* name, Field Owner::*field) {
  if constexpr (std::is_pointer_v<Field>) {
    type.def_property(
        name, [field](const Arguments& a) { return reinterpret_cast<Address>(a.*field); },
        [field](Arguments& a, Address x) { a.*field = static_cast<Field>(pointer(x)); });
  } else if constexpr (std::is_enum_v<Field>) {
    type.def_property(
        name, [field](const Arguments& a) { return static_cast<int>(a.*field); },
        [field](Arguments& a, int x) { a.*field = static_cast<Field>(x); });
  } else if constexpr (std::is_same_v<Field, Strides>) {
    type.def_property(
        name,
        [field](const Arguments& a) {
          const Strides& s = a.*field;
          return std::make_tuple(s.group, s.step, s.sample);
        },
        [field](Arguments& a, std::tuple<int64_t, int64_t, int64_t> x) {
          a.*field = {std::get<0>(x), std::get<1>(x), std::get<2>(x)};
        });
  } else {
    type.def_readwrite(name, field);
  }
}

// Types are local to their module, as the tests load a second one beside mmixer_kernels._native.
#define ATTRIBUTE(name) attribute(type, #name, &Type::name)

void bind_recurrence(py::module_& m) {
  {
    using Type = ForwardArguments;
    py::class_<Type> type(m, "ForwardArguments", py::module_local());
    type.def(py::init([] { return Type{}; }));
    ATTRIBUTE(weights), ATTRIBUTE(input_gates), ATTRIBUTE(norms), ATTRIBUTE(hx);
    ATTRIBUTE(lengths), ATTRIBUTE(states), ATTRIBUTE(packets), ATTRIBUTE(eps);
    ATTRIBUTE(G), ATTRIBUTE(T), ATTRIBUTE(B), ATTRIBUTE(H);
  }
  {
    using Type = BackwardArguments;
    py::class_<Type> type(m, "BackwardArguments", py::module_local());
    type.def(py::init([] { return Type{}; }));
    ATTRIBUTE(weights), ATTRIBUTE(x_hat), ATTRIBUTE(projected), ATTRIBUTE(r_std);
    ATTRIBUTE(norms), ATTRIBUTE(states), ATTRIBUTE(hx), ATTRIBUTE(lengths);
    ATTRIBUTE(grad_output), ATTRIBUTE(grad_output_stride), ATTRIBUTE(grad_output_dtype);
    ATTRIBUTE(grad_h_n), ATTRIBUTE(grad_gates), ATTRIBUTE(grad_gates_dtype);
    ATTRIBUTE(grad_f_tilde), ATTRIBUTE(grad_hx), ATTRIBUTE(grad_norm), ATTRIBUTE(packets);
    ATTRIBUTE(G), ATTRIBUTE(T), ATTRIBUTE(B), ATTRIBUTE(H);
  }
}

void bind_prepare(py::module_& m) {
  using Type = PrepareArguments;
  py::class_<Type> type(m, "PrepareArguments", py::module_local());
  type.def(py::init([] { return Type{}; }));
  type.def("set_weights", [](Type& a, int local, Address r, Address z, Address h,
                             Address norm_weight, Address norm_bias) {
    if (local < 0 || local >= most_weight_sets) throw std::out_of_range("weight set");
    a.set[local] = {{pointer(r), pointer(z), pointer(h)}, pointer(norm_weight), pointer(norm_bias)};
  });
  ATTRIBUTE(weight_dtype), ATTRIBUTE(norm_dtype), ATTRIBUTE(matrices_dtype), ATTRIBUTE(terms_dtype);
  ATTRIBUTE(remove_mean), ATTRIBUTE(transposed);
  ATTRIBUTE(matrices), ATTRIBUTE(terms), ATTRIBUTE(norms);
  ATTRIBUTE(first), ATTRIBUTE(count);
  ATTRIBUTE(G), ATTRIBUTE(H), ATTRIBUTE(Hp), ATTRIBUTE(parts);
}

template <class Type>
py::class_<Type> bind_rows(py::module_& m, const char* name) {
  py::class_<Type> type(m, name, py::module_local());
  type.def(py::init([] { return Type{}; }));
  ATTRIBUTE(G), ATTRIBUTE(rows), ATTRIBUTE(H), ATTRIBUTE(blocks);
  ATTRIBUTE(a), ATTRIBUTE(norms), ATTRIBUTE(eps);
  return type;
}

void bind_prologue(py::module_& m) {
  {
    using Type = NormTanhArguments;
    auto type = bind_rows<Type>(m, "NormTanhArguments");
    ATTRIBUTE(y), ATTRIBUTE(y_dtype), ATTRIBUTE(gate);
  }
  {
    using Type = NormTanhBackwardArguments;
    auto type = bind_rows<Type>(m, "NormTanhBackwardArguments");
    ATTRIBUTE(grad_y), ATTRIBUTE(grad_y_more), ATTRIBUTE(grad_a), ATTRIBUTE(grad_a_dtype);
    ATTRIBUTE(grad_norm), ATTRIBUTE(gate);
  }
  {
    using Type = MixArguments;
    auto type = bind_rows<Type>(m, "MixArguments");
    ATTRIBUTE(samples), ATTRIBUTE(context), ATTRIBUTE(f_bar), ATTRIBUTE(g_bar);
    ATTRIBUTE(dtype), ATTRIBUTE(concat), ATTRIBUTE(f_tilde), ATTRIBUTE(grad_f_tilde);
    ATTRIBUTE(grad_a), ATTRIBUTE(grad_f_bar), ATTRIBUTE(grad_g_bar), ATTRIBUTE(grad_norm);
  }
}

void bind_gates(py::module_& m) {
  {
    using Type = GateArguments;
    py::class_<Type> type(m, "GateArguments", py::module_local());
    type.def(py::init([] { return Type{}; }));
    ATTRIBUTE(G), ATTRIBUTE(T), ATTRIBUTE(B), ATTRIBUTE(H), ATTRIBUTE(first_step);
    ATTRIBUTE(steps), ATTRIBUTE(input_gates), ATTRIBUTE(state_gates), ATTRIBUTE(candidate);
    ATTRIBUTE(f_tilde), ATTRIBUTE(norms), ATTRIBUTE(states), ATTRIBUTE(hx), ATTRIBUTE(lengths);
    ATTRIBUTE(dtype), ATTRIBUTE(eps), ATTRIBUTE(r_h), ATTRIBUTE(operand), ATTRIBUTE(x_hat);
    ATTRIBUTE(r_std), ATTRIBUTE(x_hat_operand), ATTRIBUTE(f_tilde_h), ATTRIBUTE(f_tilde_r_h);
  }
  {
    using Type = GateBackwardArguments;
    py::class_<Type> type(m, "GateBackwardArguments", py::module_local());
    type.def(py::init([] { return Type{}; }));
    ATTRIBUTE(G), ATTRIBUTE(T), ATTRIBUTE(B), ATTRIBUTE(H), ATTRIBUTE(step);
    ATTRIBUTE(x_hat), ATTRIBUTE(r_std), ATTRIBUTE(norms), ATTRIBUTE(states), ATTRIBUTE(hx);
    ATTRIBUTE(lengths), ATTRIBUTE(grad_output), ATTRIBUTE(grad_output_stride);
    ATTRIBUTE(grad_output_dtype), ATTRIBUTE(dtype), ATTRIBUTE(grad_r_h), ATTRIBUTE(grad_sum);
    ATTRIBUTE(carry), ATTRIBUTE(grad_h), ATTRIBUTE(grad_gates), ATTRIBUTE(grad_f_tilde);
    ATTRIBUTE(grad_norm);
  }
}

void bind_cell(py::module_& m) {
  using Type = CellArguments;
  py::class_<Type> type(m, "CellArguments", py::module_local());
  type.def(py::init([] { return Type{}; }));
  type.def("set_weights", [](Type& a, const std::array<Address, norm_gates>& weights) {
    for (int gate = 0; gate < norm_gates; gate++) a.weight[gate] = pointer(weights[gate]);
  });
  ATTRIBUTE(input), ATTRIBUTE(context), ATTRIBUTE(hx), ATTRIBUTE(input_stride);
  ATTRIBUTE(context_stride), ATTRIBUTE(hx_stride), ATTRIBUTE(norm_weight), ATTRIBUTE(norm_bias);
  ATTRIBUTE(output), ATTRIBUTE(workspace), ATTRIBUTE(dtype), ATTRIBUTE(weight_dtype);
  ATTRIBUTE(norm_dtype), ATTRIBUTE(B), ATTRIBUTE(F), ATTRIBUTE(C), ATTRIBUTE(H);
  ATTRIBUTE(team_samples), ATTRIBUTE(blocks), ATTRIBUTE(concat), ATTRIBUTE(eps);
}

#undef ATTRIBUTE

template <auto call, class Arguments>
void bind_call(py::module_& m, const char* name) {
  m.def(name, [](const Arguments& a, Address stream) { call(a, pointer(stream)); });
}

Variant variant(int path, int samples, int parts, int terms) {
  return {static_cast<Path>(path), samples, parts, static_cast<Dtype>(terms)};
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_recurrence(m);
  bind_prepare(m);
  bind_prologue(m);
  bind_gates(m);
  bind_cell(m);
  m.attr("most_weight_sets") = most_weight_sets;
  m.def("plan", [](int path, int samples, int parts, int terms, int H, bool is_backward) {
    const Plan p = plan(variant(path, samples, parts, terms), H, is_backward);
    return std::make_tuple(p.H, p.teams, p.packets, p.refusal);
  });
  m.def("refusal", [] { return refusal(); });
  m.def("forward", [](int path, int samples, int parts, int terms, int teams,
                      const ForwardArguments& a, Address stream) {
    forward(variant(path, samples, parts, terms), teams, a, pointer(stream));
  });
  m.def("backward", [](int path, int samples, int parts, int terms, int teams,
                       const BackwardArguments& a, Address stream) {
    backward(variant(path, samples, parts, terms), teams, a, pointer(stream));
  });
  m.def("cell_plan", [](int B, int F, int C, int H, int dtype, int weight_dtype) {
    const CellPlan p =
        cell_plan(B, F, C, H, static_cast<Dtype>(dtype), static_cast<Dtype>(weight_dtype));
    return std::make_tuple(p.team_samples, p.blocks, p.workspace, p.refusal);
  });
  m.def("stream_number", [](Address stream) { return stream_number(pointer(stream)); });
  m.def("cell", [](const CellArguments& a, Address stream) { cell(a, pointer(stream)); });
  m.def("prepare", [](const PrepareArguments& a, Address stream) { prepare(a, pointer(stream)); });
  bind_call<norm_tanh, NormTanhArguments>(m, "norm_tanh");
  bind_call<norm_tanh_backward, NormTanhBackwardArguments>(m, "norm_tanh_backward");
  bind_call<mix, MixArguments>(m, "mix");
  bind_call<mix_backward, MixArguments>(m, "mix_backward");
  bind_call<reset_gate, GateArguments>(m, "reset_gate");
  bind_call<update_gate, GateArguments>(m, "update_gate");
  bind_call<update_gate_backward, GateBackwardArguments>(m, "update_gate_backward");
  bind_call<reset_gate_backward, GateBackwardArguments>(m, "reset_gate_backward");
}
