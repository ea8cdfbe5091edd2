// Reads the named tuples of mmixer_kernels/problem.py into csrc/problem.h's structs, by the methods
// of torch.Tensor, as torch is not linked.
//
// Every shape, stride and dtype is read and compared at each call. What does not fit raises a
// ValueError or a TypeError: mmixer_kernels.arguments words it for the user, and engines/native.py
// converts what may be converted.
#pragma once

#include <array>
#include <cfloat>

#include "../csrc/problem.h"
#include "fields.h"

// A Problem with groups of its own.
struct OwnProblem : mmixer::Problem {
  std::vector<mmixer::Group> list;

  mmixer::Problem problem() const {
    mmixer::Problem p = *this;
    p.groups = int64_t(list.size());
    p.group = list.data();
    return p;
  }
};

namespace fields {

template <>
struct Names<mmixer::Dtype> {
  static constexpr const char* of[] = {"float32", "float64", "bfloat16", "float16"};
};

template <>
struct Names<mmixer::Mix> {
  static constexpr const char* of[] = {"gated", "concat"};
};

template <>
struct Names<mmixer::Keep> {
  static constexpr const char* of[] = {"nothing", "states", "gates"};
};

enum class LengthsDtype { int64 };
template <>
struct Names<LengthsDtype> {
  static constexpr const char* of[] = {"int64"};
};

}  // namespace fields

namespace from_python {

namespace py = pybind11;
using mmixer::Dtype;

inline void require(bool condition, const char* name, const char* must) {
  if (!condition) throw py::value_error(std::string(name) + " must " + must);
}

// What a method without arguments, or an attribute, of an object is.
inline py::object call(PyObject* object, PyObject* method) {
  PyObject* const result = PyObject_CallMethodNoArgs(object, method);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object get(PyObject* object, PyObject* attribute) {
  PyObject* const result = PyObject_GetAttr(object, attribute);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// A tensor of `rank` dimensions: its shape and its strides in elements.
template <size_t rank>
struct Tensor {
  using Numbers = std::array<int64_t, rank>;
  Numbers shape, stride;
  Dtype dtype;
  void* address;

  Tensor(const char* name, PyObject* object) {
    static PyObject *const shape_name = fields::interned("shape"),
                           *const stride_name = fields::interned("stride"),
                           *const dtype_name = fields::interned("dtype");
    shape = numbers(name, get(object, shape_name));
    stride = numbers(name, call(object, stride_name));
    dtype = fields::enumerator<Dtype>(name, get(object, dtype_name).ptr());
    address = fields::address(name, object);
    int64_t elements = 1;
    for (const int64_t size : shape) elements *= size;
    require(address || !elements, name, "have its values in memory");
    require(stride[rank - 1] == 1 || shape[rank - 1] == 1, name, "have contiguous rows");
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (size_t i = rank; i-- > 0; expected *= shape[i])
      if (shape[i] != 1 && stride[i] != expected) return false;
    return true;
  }

  static Numbers numbers(const char* name, const py::object& tuple) {
    require(PyTuple_Check(tuple.ptr()) && PyTuple_GET_SIZE(tuple.ptr()) == rank, name,
            rank == 1   ? "have one dimension"
            : rank == 2 ? "have two dimensions"
                        : "have three dimensions");
    Numbers result;
    for (size_t i = 0; i < rank; i++) {
      result[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
      if (result[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    return result;
  }
};

// A contiguous tensor's address.
template <size_t rank>
void* contiguous(const char* name, PyObject* object, const std::array<int64_t, rank>& shape,
                 Dtype dtype) {
  const Tensor<rank> tensor(name, object);
  require(tensor.shape == shape, name, "have the shape that the other operands ask for");
  require(tensor.dtype == dtype, name, "have the dtype of its kind");
  require(tensor.is_contiguous(), name, "be contiguous");
  return tensor.address;
}

inline bool is_none(PyObject* object) { return object == Py_None; }

inline PyObject* item(py::handle tuple, Py_ssize_t i) {
  if (i >= PyTuple_GET_SIZE(tuple.ptr())) throw py::value_error("a named tuple lacks fields");
  return PyTuple_GET_ITEM(tuple.ptr(), i);
}

// The items of a list or another sequence.
class Items {
 public:
  explicit Items(PyObject* sequence)
      : fast_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence, "must be a sequence"))) {
    if (!fast_) throw py::error_already_set();
  }
  int64_t size() const { return PySequence_Fast_GET_SIZE(fast_.ptr()); }
  PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), i); }

 private:
  py::object fast_;
};

constexpr const char* weight_names[] = {"weight_f", "weight_g", "weight_s",
                                        "weight_r", "weight_z", "weight_h"};
constexpr Py_ssize_t norm_fields = mmixer::gates;  // of Weights, behind the matrices

// The columns of each matrix of a weight set.
inline std::array<int64_t, mmixer::gates> columns_of(const mmixer::Group& group, int64_t hidden) {
  return {group.input_size, group.context_size, 2 * hidden, hidden, hidden, hidden};
}

// A Weights, whose dtypes the first set gives to the Problem.
inline void weights(PyObject* set, mmixer::Problem& p, mmixer::Group& group, bool is_first) {
  if (!PyTuple_Check(set)) throw py::type_error("weights must be named tuples");
  if (is_first) {
    static PyObject* const dtype_name = fields::interned("dtype");
    const Tensor<2> r(weight_names[mmixer::gate_r], item(set, mmixer::gate_r));
    p.hidden = r.shape[0], p.weight_dtype = p.norm_dtype = r.dtype;
    if (PyObject* const norm = item(set, norm_fields); !is_none(norm))
      p.norm_dtype = fields::enumerator<Dtype>("norm_weight", get(norm, dtype_name).ptr());
  }
  const auto columns = columns_of(group, p.hidden);
  for (int gate = 0; gate < mmixer::gates; gate++)
    group.weight[gate] = contiguous<2>(weight_names[gate], item(set, gate),
                                       {p.hidden, columns[gate]}, p.weight_dtype);
  const auto norm = [&](const char* name, PyObject* object) -> const void* {
    if (is_none(object)) return nullptr;
    return contiguous<2>(name, object, {mmixer::gates, p.hidden}, p.norm_dtype);
  };
  group.norm_weight = norm("norm_weight", item(set, norm_fields));
  group.norm_bias = norm("norm_bias", item(set, norm_fields + 1));
  require(!group.norm_weight == !group.norm_bias, "norm_weight", "be given where norm_bias is");
}

inline void options(py::handle mix, py::handle eps, mmixer::Problem& p) {
  p.mix = fields::enumerator<mmixer::Mix>("mix", mix.ptr());
  require(PyFloat_CheckExact(eps.ptr()), "eps", "be a float");
  p.eps = PyFloat_AS_DOUBLE(eps.ptr());
  require(p.eps > 0 && p.eps <= DBL_MAX, "eps", "be positive and finite");
}

// A Problem, without keep and threads.
inline OwnProblem problem(py::handle tuple) {
  enum { inputs_field, contexts_field, weights_field, hx_field, lengths_field, mix, eps };
  OwnProblem p{};
  const Items inputs(item(tuple, inputs_field)), contexts(item(tuple, contexts_field)),
      sets(item(tuple, weights_field));
  require(inputs.size() > 0 && inputs.size() == contexts.size() && inputs.size() == sets.size(),
          "inputs, contexts and weights", "be as many");
  for (int64_t g = 0; g < inputs.size(); g++) {
    const Tensor<3> input("input", inputs[g]);
    const Tensor<2> context("context", contexts[g]);
    if (g == 0) p.steps = input.shape[0], p.batch = input.shape[1], p.dtype = input.dtype;
    require(input.shape[0] == p.steps && input.shape[1] == p.batch, "inputs", "agree in T and B");
    require(context.shape[0] == p.batch, "context", "have input's batch size");
    require(input.dtype == p.dtype && context.dtype == p.dtype, "inputs and contexts",
            "agree in dtype");
    mmixer::Group group{};
    group.input = input.address;
    group.input_stride_step = input.stride[0], group.input_stride_sample = input.stride[1];
    group.input_size = input.shape[2];
    group.context = context.address;
    group.context_stride_sample = context.stride[0], group.context_size = context.shape[1];
    weights(sets[g], p, group, g == 0);
    require(g == 0 || !group.norm_weight == !p.list[0].norm_weight, "norms",
            "be given for all weight sets or none");
    p.list.push_back(group);
  }
  if (PyObject* const object = item(tuple, hx_field); !is_none(object)) {
    const Tensor<3> hx("hx", object);
    require(hx.shape == Tensor<3>::Numbers{inputs.size(), p.batch, p.hidden}, "hx", "be [G, B, H]");
    require(hx.dtype == p.dtype, "hx", "have input's dtype");
    p.hx = hx.address, p.hx_stride_group = hx.stride[0], p.hx_stride_sample = hx.stride[1];
  }
  if (PyObject* const lengths = item(tuple, lengths_field); !is_none(lengths)) {
    static PyObject *const dtype_name = fields::interned("dtype"),
                           *const shape_name = fields::interned("shape"),
                           *const stride_name = fields::interned("stride");
    fields::enumerator<fields::LengthsDtype>("lengths", get(lengths, dtype_name).ptr());
    require(Tensor<1>::numbers("lengths", get(lengths, shape_name))[0] == p.batch, "lengths",
            "be [B]");
    require(Tensor<1>::numbers("lengths", call(lengths, stride_name))[0] == 1 || p.batch == 1,
            "lengths", "be contiguous");
    p.lengths = static_cast<const int64_t*>(fields::address("lengths", lengths));
    require(p.lengths, "lengths", "have its values in memory");
  }
  options(item(tuple, mix), item(tuple, eps), p);
  return p;
}

// A Step: a Problem of one step and one weight set, of which only what a step has is filled.
struct OneStep : mmixer::Problem, mmixer::Group {};

inline OneStep step(py::handle tuple) {
  enum { input_field, context_field, weights_field, hx_field, mix, eps };
  OneStep s{};
  const Tensor<2> input("input", item(tuple, input_field)),
      context("context", item(tuple, context_field));
  s.batch = input.shape[0], s.dtype = input.dtype;
  require(context.shape[0] == s.batch, "context", "have input's batch size");
  require(context.dtype == s.dtype, "context", "have input's dtype");
  s.input = input.address, s.input_stride_sample = input.stride[0];
  s.input_size = input.shape[1];
  s.context = context.address, s.context_stride_sample = context.stride[0];
  s.context_size = context.shape[1];
  weights(item(tuple, weights_field), s, s, true);
  if (PyObject* const object = item(tuple, hx_field); !is_none(object)) {
    const Tensor<2> hx("hx", object);
    require(hx.shape == Tensor<2>::Numbers{s.batch, s.hidden}, "hx", "be [B, H]");
    require(hx.dtype == s.dtype, "hx", "have input's dtype");
    s.hx = hx.address, s.hx_stride_sample = hx.stride[0];
  }
  options(item(tuple, mix), item(tuple, eps), s);
  return s;
}

// A Cotangents: the gradients of output [G, T, B, H], or [T, B, H] of one weight set, and of h_n
// [G, B, H], with strides; null for zeros.
inline mmixer::Cotangents cotangents(py::handle tuple, const mmixer::Problem& p) {
  enum { output_field, h_n_field };
  mmixer::Cotangents result{};
  if (PyObject* const object = item(tuple, output_field); !is_none(object)) {
    static PyObject* const dim_name = fields::interned("ndim");
    const bool is_grouped = PyLong_AsLong(get(object, dim_name).ptr()) == 4;
    const auto fill = [&](const auto& tensor, size_t first) {
      require(tensor.shape[first] == p.steps && tensor.shape[first + 1] == p.batch &&
                  tensor.shape[first + 2] == p.hidden &&
                  (is_grouped ? tensor.shape[0] == p.groups : p.groups == 1),
              "grad_output", "have output's shape");
      require(tensor.dtype == p.dtype, "grad_output", "have output's dtype");
      result.grad_output = tensor.address;
      result.grad_output_stride_group = is_grouped ? tensor.stride[0] : 0;
      result.grad_output_stride_step = tensor.stride[first];
      result.grad_output_stride_sample = tensor.stride[first + 1];
    };
    if (is_grouped)
      fill(Tensor<4>("grad_output", object), 1);
    else
      fill(Tensor<3>("grad_output", object), 0);
  }
  if (PyObject* const object = item(tuple, h_n_field); !is_none(object)) {
    const Tensor<3> h_n("grad_h_n", object);
    require(h_n.shape == Tensor<3>::Numbers{p.groups, p.batch, p.hidden}, "grad_h_n",
            "have h_n's shape");
    require(h_n.dtype == p.dtype, "grad_h_n", "have h_n's dtype");
    result.grad_h_n = h_n.address;
    result.grad_h_n_stride_group = h_n.stride[0], result.grad_h_n_stride_sample = h_n.stride[1];
  }
  return result;
}

// A Gradients, made for the Problem by engines/native.py: contiguous, in the operands' shapes.
inline std::vector<mmixer::GroupGradient> gradients(py::handle tuple, int64_t groups) {
  enum { inputs_field, contexts_field, weights_field };
  const Items inputs(item(tuple, inputs_field)), contexts(item(tuple, contexts_field)),
      sets(item(tuple, weights_field));
  const auto are_there = [&](const Items& items) {
    require(items.size() == 0 || items.size() == groups, "gradients",
            "have one entry per weight set, or none");
    return items.size() > 0;
  };
  const bool has_inputs = are_there(inputs), has_weights = are_there(sets);
  require(are_there(contexts), "gradients", "have the contexts'");
  std::vector<mmixer::GroupGradient> all(groups);
  for (int64_t g = 0; g < groups; g++) {
    if (has_inputs) all[g].input = fields::address("input", inputs[g]);
    all[g].context = fields::address("context", contexts[g]);
    if (!has_weights) continue;
    for (int gate = 0; gate < mmixer::gates; gate++)
      all[g].weight[gate] = fields::address(weight_names[gate], item(sets[g], gate));
    all[g].norm_weight = fields::address("norm_weight", item(sets[g], norm_fields));
    all[g].norm_bias = fields::address("norm_bias", item(sets[g], norm_fields + 1));
  }
  return all;
}

}  // namespace from_python

// m.Problem(problem=, keep=): the call as an object that the others take, which lives as
// long as its tensors do.
struct MakeProblem {
  pybind11::handle problem;
  mmixer::Keep keep;
};

// check throws std::invalid_argument for what the engine does not take.
template <void (*check)(const mmixer::Problem&)>
fields::Filled<OwnProblem> make_problem(const MakeProblem& call) {
  fields::Filled<OwnProblem> filled{from_python::problem(call.problem)};
  filled.value.keep = call.keep;
  check(filled.value.problem());
  return filled;
}

namespace fields {

// It has no fields to give: make_problem fills it.
template <>
inline Table<OwnProblem> describe() {
  return Table<OwnProblem>("Problem");
}

template <>
inline Table<MakeProblem> describe() {
  return Table<MakeProblem>("Problem")
      .field("problem", &MakeProblem::problem)
      .field("keep", &MakeProblem::keep);
}

// The matrices and norms of a WeightSet.
template <class Struct>
Table<Struct>& add_weights(Table<Struct>& table) {
  for (int gate = 0; gate < mmixer::gates; gate++)
    table.element(from_python::weight_names[gate], &Struct::weight, gate);
  return table.field("norm_weight", &Struct::norm_weight).field("norm_bias", &Struct::norm_bias);
}

}  // namespace fields

template <void (*check)(const mmixer::Problem&)>
void bind_problem(pybind11::module_& m) {
  using Type = fields::Filled<OwnProblem>;
  if (!pybind11::detail::get_type_info(typeid(Type)))  // by this extension's other engine
    pybind11::class_<Type>(m, "_Problem", pybind11::module_local());
  fields::add_call<make_problem<check>>(m);
}
