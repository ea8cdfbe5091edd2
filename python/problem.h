// Reads Python's tensors into csrc/problem.h's structs, by the methods of torch.Tensor, as torch is
// not linked.
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
  static constexpr const char* of[] = {"float32", "float64", "bfloat16", "float16", "int8"};
};

template <>
struct Names<mmixer::Mix> {
  static constexpr const char* of[] = {"gated", "concat"};
};

template <>
struct Names<mmixer::Keep> {
  static constexpr const char* of[] = {"nothing", "states", "gates"};
};

// problem.py's Layout: the shapes of a call's results.
enum class Layout { group, sequence, step, concatenated };
template <>
struct Names<Layout> {
  static constexpr const char* of[] = {"group", "sequence", "step", "concatenated"};
};

enum class LengthsDtype { int64 };
template <>
struct Names<LengthsDtype> {
  static constexpr const char* of[] = {"int64"};
};

}  // namespace fields

namespace from_python {

namespace py = pybind11;
using fields::Layout;
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

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2;
}

// The address of a tensor that has elements. That of a freed storage's tensor is its offset there;
// no offset is as large as most addresses are, so that few tensors are asked for theirs.
inline void* address(const char* name, PyObject* object, int64_t element_bytes) {
  constexpr uintptr_t largest_offset = uintptr_t(1) << 40;
  static PyObject* const offset_name = fields::interned("storage_offset");
  void* const address = fields::address(name, object);
  if (reinterpret_cast<uintptr_t>(address) > largest_offset) return address;
  const int64_t offset = PyLong_AsLongLong(call(object, offset_name).ptr());
  if (offset == -1 && PyErr_Occurred()) throw py::error_already_set();
  require(reinterpret_cast<uintptr_t>(address) != uintptr_t(offset * element_bytes), name,
          "have its values in memory");
  return address;
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
    int64_t elements = 1;
    for (const int64_t size : shape) elements *= size;
    address = elements ? from_python::address(name, object, bytes_of(dtype)) : nullptr;
    require(stride[rank - 1] == 1 || shape[rank - 1] == 1, name, "have contiguous rows");
  }

  static Numbers numbers(const char* name, const py::object& tuple) {
    constexpr const char* must[] = {"", "have one dimension", "have two dimensions",
                                    "have three dimensions", "have four dimensions"};
    require(PyTuple_Check(tuple.ptr()) && PyTuple_GET_SIZE(tuple.ptr()) == rank, name, must[rank]);
    Numbers result;
    for (size_t i = 0; i < rank; i++) {
      result[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
      if (result[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    return result;
  }
};

// A contiguous matrix's address.
inline void* contiguous(const char* name, PyObject* object, const std::array<int64_t, 2>& shape,
                        Dtype dtype) {
  static PyObject *const shape_name = fields::interned("shape"),
                         *const dtype_name = fields::interned("dtype"),
                         *const contiguous_name = fields::interned("is_contiguous");
  require(Tensor<2>::numbers(name, get(object, shape_name)) == shape, name,
          "have the shape that the other operands ask for");
  require(fields::enumerator<Dtype>(name, get(object, dtype_name).ptr()) == dtype, name,
          "have the dtype of its kind");
  require(call(object, contiguous_name).ptr() == Py_True, name, "be contiguous");
  return address(name, object, bytes_of(dtype));
}

inline bool is_none(PyObject* object) { return object == Py_None; }

inline PyObject* item(py::handle tuple, Py_ssize_t i) {
  if (!PyTuple_Check(tuple.ptr()) || i >= PyTuple_GET_SIZE(tuple.ptr()))
    throw py::type_error("must be a named tuple of problem.py");
  return PyTuple_GET_ITEM(tuple.ptr(), i);
}

// The items of a list or another sequence, kept where a method of one of them changes the list.
class Items {
 public:
  explicit Items(PyObject* sequence)
      : fast_(py::reinterpret_steal<py::object>(
            PyList_Check(sequence) ? PyList_AsTuple(sequence)
                                   : PySequence_Fast(sequence, "must be a sequence"))) {
    if (!fast_) throw py::error_already_set();
  }
  int64_t size() const { return PySequence_Fast_GET_SIZE(fast_.ptr()); }
  PyObject*& operator[](int64_t i) const { return PySequence_Fast_ITEMS(fast_.ptr())[i]; }

 private:
  py::object fast_;
};

constexpr const char* weight_names[] = {"weight_f", "weight_g", "weight_s",
                                        "weight_r", "weight_z", "weight_h"};

// The columns of each matrix of a weight set.
inline std::array<int64_t, mmixer::gates> columns_of(const mmixer::Group& group, int64_t hidden) {
  return {group.input_size, group.context_size, 2 * hidden, hidden, hidden, hidden};
}

// The number of a weight set's matrices, whose order is that of the norms' rows.
inline int64_t matrices_of(bool has_context) { return mmixer::norm_rows(has_context); }
inline int64_t matrix_of(int gate, bool has_context) { return mmixer::norm_row(gate, has_context); }

// The tensors of a weight set, its matrices, of int8 their scale, and two norms or none. The first
// set gives its dtypes to the Problem.
inline void weights(PyObject* const* set, int64_t size, mmixer::Problem& p, mmixer::Group& group,
                    bool is_first) {
  const int64_t matrices = matrices_of(p.has_context);
  require(size >= matrices, "a weight set", "have a matrix per gate");
  if (is_first) {
    static PyObject* const dtype_name = fields::interned("dtype");
    static PyObject* const shape_name = fields::interned("shape");
    const char* const name = weight_names[mmixer::gate_r];
    PyObject* const weight_r = set[matrix_of(mmixer::gate_r, p.has_context)];
    p.hidden = Tensor<2>::numbers(name, get(weight_r, shape_name))[0];
    p.weight_dtype = fields::enumerator<Dtype>(name, get(weight_r, dtype_name).ptr());
    p.norm_dtype = fields::enumerator<Dtype>("norm_bias", get(set[size - 1], dtype_name).ptr());
  }
  const bool has_scale = p.weight_dtype == Dtype::int8;
  const int64_t norms = matrices + has_scale;
  require(size == norms || size == norms + 2, "a weight set",
          p.has_context ? "have six matrices, and two norms"
                        : "have four matrices without context, and two norms");
  const auto columns = columns_of(group, p.hidden);
  for (int gate = 0; gate < mmixer::gates; gate++)
    if (mmixer::has_gate(gate, p.has_context))
      group.weight[gate] = contiguous(weight_names[gate], set[matrix_of(gate, p.has_context)],
                                      {p.hidden, columns[gate]}, p.weight_dtype);
  const std::array<int64_t, 2> shape = {mmixer::norm_rows(p.has_context), p.hidden};
  if (has_scale)
    group.scale =
        static_cast<const float*>(contiguous("scale", set[matrices], shape, Dtype::float32));
  if (size == norms) return;
  group.norm_weight = contiguous("norm_weight", set[norms], shape, p.norm_dtype);
  group.norm_bias = contiguous("norm_bias", set[norms + 1], shape, p.norm_dtype);
}

inline void options(py::handle mix, py::handle eps, mmixer::Problem& p) {
  p.mix = fields::enumerator<mmixer::Mix>("mix", mix.ptr());
  const bool is_integer = PyLong_Check(eps.ptr()) && !PyBool_Check(eps.ptr());
  require(PyFloat_Check(eps.ptr()) || is_integer, "eps", "be a float or an integer");
  fields::assign(p.eps, "eps", eps.ptr());
  require(p.eps > 0 && p.eps <= DBL_MAX, "eps", "be positive and finite");
}

// A call without its tensors: the fields of problem.py's Call and of the Form in it.
struct Form {
  int64_t groups, weights;
  bool has_context, has_hx, has_lengths;
  py::handle mix, eps;
  bool bidirectional;  // the second half of the sets runs in reverse
  mmixer::Keep keep;
  bool batch_first;  // inputs are [B, T, input_size], and output has B and T in this order too
  Layout layout;

  explicit Form(py::handle call) {
    enum { form, keep_field, layout_field, batch_first_field };
    enum {
      groups_field,
      weights_field,
      context_field,
      hx_field,
      lengths_field,
      mix_field,
      eps_field,
      bidirectional_field
    };
    const py::handle tuple = item(call, form);
    fields::assign(groups, "groups", item(tuple, groups_field));
    fields::assign(weights, "weights", item(tuple, weights_field));
    fields::assign(has_context, "has_context", item(tuple, context_field));
    fields::assign(has_hx, "has_hx", item(tuple, hx_field));
    fields::assign(has_lengths, "has_lengths", item(tuple, lengths_field));
    mix = item(tuple, mix_field), eps = item(tuple, eps_field);
    fields::assign(bidirectional, "bidirectional", item(tuple, bidirectional_field));
    fields::assign(keep, "keep", item(call, keep_field));
    fields::assign(batch_first, "batch_first", item(call, batch_first_field));
    fields::assign(layout, "layout", item(call, layout_field));
    require(groups > 0 && weights > 0 && weights % groups == 0, "weights", "be sets");
    require(!bidirectional || groups % 2 == 0, "bidirectional", "be of an even number of sets");
    require(layout == Layout::group || layout == Layout::concatenated || groups == 1, "layout",
            "be group or concatenated with more than one set");
    require(layout != Layout::step || !(batch_first || has_lengths), "layout",
            "not be step with batch_first or lengths");
  }

  int64_t set_size() const { return weights / groups; }
  int64_t contexts() const { return has_context ? groups : 0; }
  int64_t first_weight() const { return groups + contexts(); }  // among the tensors
  int64_t tensors() const { return first_weight() + weights + has_hx + has_lengths; }
};

// A call's Problem, whose tensors are those of problem.py's Problem.tensors().
inline OwnProblem problem(const Form& form, const Items& tensors) {
  require(tensors.size() == form.tensors(), "tensors", "be as many as the form says");
  const int64_t groups = form.groups, first_weight = form.first_weight();
  OwnProblem p{};
  p.has_context = form.has_context, p.keep = form.keep;
  p.list.reserve(groups);
  for (int64_t g = 0; g < groups; g++) {
    mmixer::Group group{};
    group.reverse = form.bidirectional && 2 * g >= groups;
    Dtype dtype;
    int64_t steps = 1, batch;
    if (form.layout == Layout::step) {
      const Tensor<2> input("input", tensors[g]);
      batch = input.shape[0], group.input_size = input.shape[1];
      group.input = input.address, group.input_stride_sample = input.stride[0];
      dtype = input.dtype;
    } else {
      const Tensor<3> input("input", tensors[g]);
      const int step = form.batch_first, sample = !form.batch_first;  // dimensions
      steps = input.shape[step], batch = input.shape[sample], group.input_size = input.shape[2];
      group.input = input.address, group.input_stride_step = input.stride[step];
      group.input_stride_sample = input.stride[sample];
      dtype = input.dtype;
    }
    if (g == 0) p.steps = steps, p.batch = batch, p.dtype = dtype;
    require(steps == p.steps && batch == p.batch, "inputs", "agree in T and B");
    require(dtype == p.dtype, "inputs and contexts", "agree in dtype");
    if (form.has_context) {
      const Tensor<2> context("context", tensors[groups + g]);
      require(context.shape[0] == p.batch, "context", "have input's batch size");
      require(context.dtype == p.dtype, "inputs and contexts", "agree in dtype");
      group.context = context.address;
      group.context_stride_sample = context.stride[0], group.context_size = context.shape[1];
    }
    weights(&tensors[first_weight + g * form.set_size()], form.set_size(), p, group, g == 0);
    p.list.push_back(group);
  }
  int64_t next = first_weight + form.weights;
  if (form.has_hx) {
    const auto read = [&](const auto& hx, bool is_whole) {
      require(is_whole, "hx", "be [G, B, H], or [B, H] for a step");
      require(hx.dtype == p.dtype, "hx", "have input's dtype");
      p.hx = hx.address;
    };
    if (form.layout == Layout::step) {
      const Tensor<2> hx("hx", tensors[next++]);
      read(hx, hx.shape == Tensor<2>::Numbers{p.batch, p.hidden});
      p.hx_stride_sample = hx.stride[0];
    } else {
      const Tensor<3> hx("hx", tensors[next++]);
      read(hx, hx.shape == Tensor<3>::Numbers{groups, p.batch, p.hidden});
      p.hx_stride_group = hx.stride[0], p.hx_stride_sample = hx.stride[1];
    }
  }
  if (form.has_lengths) {
    static PyObject *const dtype_name = fields::interned("dtype"),
                           *const shape_name = fields::interned("shape"),
                           *const stride_name = fields::interned("stride");
    PyObject* const lengths = tensors[next];
    fields::enumerator<fields::LengthsDtype>("lengths", get(lengths, dtype_name).ptr());
    require(Tensor<1>::numbers("lengths", get(lengths, shape_name))[0] == p.batch, "lengths",
            "be [B]");
    require(Tensor<1>::numbers("lengths", call(lengths, stride_name))[0] == 1 || p.batch == 1,
            "lengths", "be contiguous");
    p.lengths = static_cast<const int64_t*>(address("lengths", lengths, sizeof(int64_t)));
  }
  options(form.mix, form.eps, p);
  return p;
}

}  // namespace from_python

namespace fields {

// The matrices and norms of a WeightSet.
template <class Struct>
Table<Struct>& add_weights(Table<Struct>& table) {
  for (int gate = 0; gate < mmixer::gates; gate++)
    table.element(from_python::weight_names[gate], &Struct::weight, gate);
  return table.field("norm_weight", &Struct::norm_weight).field("norm_bias", &Struct::norm_bias);
}

}  // namespace fields
