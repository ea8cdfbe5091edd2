// A pass of an engine, from Python's tensors to Python's tensors: they are read, the results are
// allocated by torch, and one call of csrc computes.
//
// An Engine has Options, the arguments of its own; check, which throws std::invalid_argument;
// saved_size in elements of the compute dtype and the workspaces' in bytes; workspace, whose get()
// is that memory beside a tensor; forward and backward.
#pragma once

#include "problem.h"

namespace passes {

namespace py = pybind11;
using from_python::Form;
using from_python::Items;
using from_python::Layout;
using mmixer::Dtype;

inline py::object torch(const char* name) { return py::module_::import("torch").attr(name); }

// new_empty of a tensor; dtype is the tensor's own where it is null. Sizes as arguments of their
// own cost torch a third less than a tuple.
template <class... Sizes>
py::object new_empty(PyObject* like, PyObject* dtype, Sizes... sizes) {
  static PyObject *const name = fields::interned("new_empty"),
                         *const names = py::make_tuple("dtype").release().ptr();
  constexpr size_t count = sizeof...(sizes);
  const py::int_ numbers[] = {py::int_(int64_t(sizes))...};
  PyObject* arguments[count + 2] = {like};
  for (size_t i = 0; i < count; i++) arguments[i + 1] = numbers[i].ptr();
  arguments[count + 1] = dtype;
  PyObject* const result =
      PyObject_VectorcallMethod(name, arguments, (count + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                dtype ? names : nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline py::object new_bytes(PyObject* like, int64_t size) {
  static PyObject* const uint8 = torch("uint8").release().ptr();
  return new_empty(like, uint8, size);
}

inline void* address(const py::object& tensor) { return fields::address("memory", tensor.ptr()); }

// Memory of torch's allocator, on a tensor's device. Its address is there without the GIL too.
class TorchMemory {
 public:
  TorchMemory(PyObject* like, int64_t bytes)
      : tensor_(new_bytes(like, bytes)), address_(address(tensor_)) {}
  void* get() const { return address_; }

 private:
  py::object tensor_;
  void* address_;
};

// The first two of three dimensions, or those before the last, in the other order, in place.
inline void swap_steps_and_samples(const py::object& tensor, int first) {
  static PyObject* const name = fields::interned("transpose_");
  const py::object dims[] = {py::int_(first), py::int_(first + 1)};
  PyObject* const arguments[] = {tensor.ptr(), dims[0].ptr(), dims[1].ptr()};
  const auto result = py::reinterpret_steal<py::object>(
      PyObject_VectorcallMethod(name, arguments, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!result) throw py::error_already_set();
}

// Of what is saved.
inline Dtype compute_dtype(const mmixer::Problem& p) {
  return p.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

template <class Engine>
struct Forward : Engine::Options {
  py::handle call, tensors;
};

// Output, h_n or None for a step, and what is left for backward or None.
template <class Engine>
py::object forward(const Forward<Engine>& c) {
  const Form form(c.call);
  const Items tensors(c.tensors.ptr());
  const OwnProblem own = from_python::problem(form, tensors);
  const mmixer::Problem p = own.problem();
  Engine::check(p);
  PyObject* const like = tensors[0];
  py::object output, h_n;
  switch (form.layout) {
    case Layout::group:
      output = new_empty(like, nullptr, p.groups, p.steps, p.batch, p.hidden);
      break;
    case Layout::sequence: output = new_empty(like, nullptr, p.steps, p.batch, p.hidden); break;
    case Layout::step: output = new_empty(like, nullptr, p.batch, p.hidden); break;
    case Layout::concatenated:
      output = new_empty(like, nullptr, p.steps, p.batch, p.groups * p.hidden);
  }
  if (form.layout == Layout::step)
    h_n = output;  // the same values
  else
    h_n = new_empty(like, nullptr, p.groups, p.batch, p.hidden);
  py::object saved = py::none();
  if (p.keep != mmixer::Keep::nothing) {
    static PyObject* const float32 = torch("float32").release().ptr();
    saved = new_empty(like, p.dtype == compute_dtype(p) ? nullptr : float32, Engine::saved_size(p));
  }
  const bool is_concatenated = form.layout == Layout::concatenated;
  const int64_t sample = is_concatenated ? p.groups * p.hidden : p.hidden, step = p.batch * sample;
  const mmixer::Results results{address(output), is_concatenated ? p.hidden : p.steps * step, step,
                                sample, address(h_n)};
  void* const to_saved = saved.is_none() ? nullptr : address(saved);
  // After all calls of Python, which may call an engine with the same memory.
  const auto workspace = Engine::workspace(like, Engine::forward_workspace_size(p, c));
  {
    const py::gil_scoped_release release;
    Engine::forward(p, c, results, to_saved, workspace.get());
  }
  if (form.batch_first) swap_steps_and_samples(output, form.layout == Layout::group);
  if (form.layout == Layout::step) h_n = py::none();
  return py::make_tuple(output, h_n, saved);
}

// The gradients of the results, with the tensors that have them.
struct Cotangents : mmixer::Cotangents {
  py::object output, h_n;
};

// A tensor, or a copy of it, with contiguous rows.
inline py::object with_rows(py::handle tensor) {
  static PyObject *const stride_name = fields::interned("stride"),
                         *const size_name = fields::interned("size"),
                         *const contiguous_name = fields::interned("contiguous");
  static PyObject* const last = py::int_(-1).release().ptr();
  const auto number = [&](PyObject* method) {
    const auto result =
        py::reinterpret_steal<py::object>(PyObject_CallMethodOneArg(tensor.ptr(), method, last));
    if (!result) throw py::error_already_set();
    return PyLong_AsLongLong(result.ptr());
  };
  if (number(stride_name) == 1 || number(size_name) == 1)
    return py::reinterpret_borrow<py::object>(tensor);
  return from_python::call(tensor.ptr(), contiguous_name);
}

// output and h_n are None for zeros.
inline Cotangents cotangents(const Form& form, const mmixer::Problem& p, py::handle output,
                             py::handle h_n) {
  Cotangents result{};
  if (!output.is_none()) {
    result.output = with_rows(output);
    const auto fill = [&](const auto& tensor, size_t first) {
      const size_t step = first + form.batch_first, sample = first + !form.batch_first;
      const int64_t sets = form.layout == Layout::concatenated ? p.groups : 1;
      from_python::require(tensor.shape[step] == p.steps && tensor.shape[sample] == p.batch &&
                               tensor.shape[first + 2] == sets * p.hidden &&
                               (first == 0 || tensor.shape[0] == p.groups),
                           "grad_output", "have output's shape");
      from_python::require(tensor.dtype == p.dtype, "grad_output", "have output's dtype");
      result.grad_output = tensor.address;
      result.grad_output_stride_group = first ? tensor.stride[0] : p.hidden;
      result.grad_output_stride_step = tensor.stride[step];
      result.grad_output_stride_sample = tensor.stride[sample];
    };
    switch (form.layout) {
      case Layout::group:
        fill(from_python::Tensor<4>("grad_output", result.output.ptr()), 1);
        break;
      case Layout::sequence:
      case Layout::concatenated:
        fill(from_python::Tensor<3>("grad_output", result.output.ptr()), 0);
        break;
      case Layout::step: {
        const from_python::Tensor<2> tensor("grad_output", result.output.ptr());
        from_python::require(tensor.shape == from_python::Tensor<2>::Numbers{p.batch, p.hidden} &&
                                 tensor.dtype == p.dtype,
                             "grad_output", "have output's shape and dtype");
        result.grad_output = tensor.address;
        result.grad_output_stride_sample = tensor.stride[0];
      }
    }
  }
  if (!h_n.is_none()) {
    result.h_n = with_rows(h_n);
    const from_python::Tensor<3> tensor("grad_h_n", result.h_n.ptr());
    from_python::require(tensor.shape ==
                             from_python::Tensor<3>::Numbers{p.groups, p.batch, p.hidden},
                         "grad_h_n", "have h_n's shape");
    from_python::require(tensor.dtype == p.dtype, "grad_h_n", "have h_n's dtype");
    result.grad_h_n = tensor.address;
    result.grad_h_n_stride_group = tensor.stride[0];
    result.grad_h_n_stride_sample = tensor.stride[1];
  }
  return result;
}

// Memory for the gradient of a contiguous tensor, at half the time of new_empty; dtype is the
// tensor's own where it is null.
inline py::object empty_like(PyObject* tensor, PyObject* dtype) {
  static PyObject *const function = torch("empty_like").release().ptr(),
                         *const names = py::make_tuple("dtype").release().ptr();
  PyObject* const arguments[] = {tensor, dtype};
  PyObject* const result = PyObject_Vectorcall(function, arguments, 1, dtype ? names : nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

template <class Engine>
struct Backward : Engine::Options {
  py::handle call, tensors;
  py::handle saved, grad_output, grad_h_n, needs;
};

// The gradients of the tensors, in their order and, unless Engine::narrows, in the inputs' dtype.
// None for those that are not needed, but that one of the weights brings all of them, as one of the
// inputs or contexts does. needs may have one entry more, for the gradient of the first state where
// the call has no hx.
template <class Engine>
py::object backward(const Backward<Engine>& c) {
  const Form form(c.call);
  const Items tensors(c.tensors.ptr()), needs(c.needs.ptr());
  const OwnProblem own = from_python::problem(form, tensors);
  const mmixer::Problem p = own.problem();
  Engine::check(p);
  const from_python::Tensor<1> saved("saved", c.saved.ptr());
  from_python::require(saved.shape[0] == Engine::saved_size(p) && saved.dtype == compute_dtype(p),
                       "saved", "be what forward left");
  const Cotangents given = cotangents(form, p, c.grad_output, c.grad_h_n);
  const bool of_no_hx = needs.size() == tensors.size() + 1;
  from_python::require(needs.size() == tensors.size() || (of_no_hx && !form.has_hx), "needs",
                       "be as many as tensors");
  const int64_t groups = form.groups, first_weight = form.first_weight();
  const int64_t hx = first_weight + form.weights;
  const auto any = [&](int64_t first, int64_t count) {
    bool found = false;
    for (int64_t i = first; i < first + count; i++) found |= needs[i] == Py_True;
    return found;
  };
  const bool need_inputs = any(0, groups), need_weights = any(first_weight, form.weights);
  std::vector<py::object> results(needs.size(), py::none());
  const bool is_step = form.layout == Layout::step;
  if (need_inputs)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t size = p.group[g].input_size;
      results[g] = is_step ? new_empty(tensors[g], nullptr, p.batch, size)
                           : new_empty(tensors[g], nullptr, p.steps, p.batch, size);
    }
  if (any(groups, form.contexts()))
    for (int64_t g = 0; g < groups; g++)
      results[groups + g] = new_empty(tensors[g], nullptr, p.batch, p.group[g].context_size);
  if (need_weights) {
    py::object dtype;
    if (!Engine::narrows && (p.weight_dtype != p.dtype || p.norm_dtype != p.dtype)) {
      static PyObject* const name = fields::interned("dtype");
      dtype = from_python::get(tensors[0], name);
    }
    for (int64_t i = first_weight; i < hx; i++) results[i] = empty_like(tensors[i], dtype.ptr());
  }
  const int64_t of_hx = form.has_hx ? hx : needs.size() - 1;
  py::object grad_hx = py::none();
  if ((form.has_hx || of_no_hx) && needs[of_hx] == Py_True) {
    grad_hx = is_step ? new_empty(tensors[0], nullptr, p.batch, p.hidden)
                      : new_empty(tensors[0], nullptr, p.groups, p.batch, p.hidden);
    results[of_hx] = grad_hx;
  }

  const auto memory = [&](int64_t i) {
    return results[i].is_none() ? nullptr : address(results[i]);
  };
  std::vector<mmixer::GroupGradient> gradients(groups);
  for (int64_t g = 0; g < groups; g++) {
    mmixer::GroupGradient& gradient = gradients[g];
    gradient.input = memory(g);
    if (form.has_context) gradient.context = memory(groups + g);
    const int64_t first = first_weight + g * form.set_size();
    for (int gate = 0; gate < mmixer::gates; gate++)
      if (mmixer::has_gate(gate, form.has_context))
        gradient.weight[gate] = memory(first + from_python::matrix_of(gate, form.has_context));
    const int64_t norms = first + from_python::matrices_of(form.has_context);
    if (norms == first + form.set_size()) continue;
    gradient.norm_weight = memory(norms), gradient.norm_bias = memory(norms + 1);
  }
  void* const to_hx = grad_hx.is_none() ? nullptr : address(grad_hx);
  const auto workspace =
      Engine::workspace(tensors[0], Engine::backward_workspace_size(p, c, need_weights));
  {
    const py::gil_scoped_release release;
    Engine::backward(p, c, given, saved.address, gradients.data(), to_hx, workspace.get());
  }
  if (need_inputs && form.batch_first)
    for (int64_t g = 0; g < groups; g++) swap_steps_and_samples(results[g], 0);
  py::tuple all(results.size());
  for (size_t i = 0; i < results.size(); i++)
    PyTuple_SET_ITEM(all.ptr(), i, results[i].release().ptr());
  return std::move(all);
}

// The fields that every engine's calls have.
template <class Struct>
fields::Table<Struct> describe_forward(fields::Table<Struct> table) {
  return table.field("call", &Struct::call).field("tensors", &Struct::tensors);
}

template <class Struct>
fields::Table<Struct> describe_backward(fields::Table<Struct> table) {
  return describe_forward(table)
      .field("saved", &Struct::saved)
      .field("grad_output", &Struct::grad_output)
      .field("grad_h_n", &Struct::grad_h_n)
      .field("needs", &Struct::needs);
}

}  // namespace passes
