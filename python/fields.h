// Fills a C++ struct's fields by name, from the keyword arguments of one Python call: there is no
// position to mistake, and a field that is unknown, missing or of another type raises a TypeError
// that names it.
//
// A call's time on the host counts, hence CPython's own calling convention (METH_FASTCALL), without
// a dict. A name is found by its pointer, as Python interns the names in source code, and at once
// where the caller keeps to the table's order.
//
// Tables and the names in them are static, one of each per extension, and the GIL guards them: an
// extension of pybind11 asks a free-threaded Python to keep it. Subinterpreters are not supported,
// as torch does not support them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fields {

namespace py = pybind11;

// The names of an enumeration's values, in their order, as `of`.
template <class Enumeration>
struct Names;

[[noreturn]] inline void refuse(const char* name, const std::string& expected, PyObject* value) {
  throw py::type_error(std::string(name) + " must be " + expected + ", not " +
                       std::string(py::repr(value)));
}

// Instead of Python's own error, which does not name the field; one of another kind passes.
[[noreturn]] inline void refuse_instead_of(PyObject* error, const char* name, const char* expected,
                                           PyObject* value) {
  if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " is too large: " + std::string(py::repr(value)));
  }
  if (!PyErr_ExceptionMatches(error)) throw py::error_already_set();
  PyErr_Clear();
  refuse(name, expected, value);
}

inline PyObject* interned(const char* name) {
  PyObject* const object = PyUnicode_InternFromString(name);
  if (!object) throw py::error_already_set();
  return object;
}

// An address, or what a tensor's data_ptr() answers; None is null.
inline void* address(const char* name, PyObject* value) {
  if (value == Py_None) return nullptr;
  static PyObject* const data_ptr = interned("data_ptr");
  constexpr const char* expected = "a tensor, an address or None";
  const auto number = py::reinterpret_steal<py::object>(
      PyLong_Check(value) ? Py_NewRef(value) : PyObject_CallMethodNoArgs(value, data_ptr));
  if (!number) refuse_instead_of(PyExc_AttributeError, name, expected, value);
  void* const result = PyLong_AsVoidPtr(number.ptr());
  if (!result && PyErr_Occurred()) refuse_instead_of(PyExc_TypeError, name, expected, value);
  return result;
}

// From a name, or from a torch.dtype, whose str() is torch's name, a dot and its own. A dtype is
// known by its address the next time.
template <class Enumeration>
Enumeration enumerator(const char* name, PyObject* value) {
  constexpr auto& names = Names<Enumeration>::of;
  static std::vector<std::pair<PyObject*, Enumeration>> known = [] {
    std::vector<std::pair<PyObject*, Enumeration>> all;
    for (const char* one : names) all.emplace_back(interned(one), Enumeration(all.size()));
    return all;
  }();
  for (const auto& [object, found] : known)
    if (object == value) return found;
  const bool is_name = PyUnicode_Check(value);
  const std::string text = is_name ? "" : std::string(py::str(value));
  std::string all;
  for (size_t i = 0; i < std::size(names); i++) {
    if (is_name ? PyUnicode_CompareWithASCIIString(value, names[i]) == 0
                : text == std::string("torch.") + names[i]) {
      if (!is_name) known.emplace_back(Py_NewRef(value), Enumeration(i));
      return Enumeration(i);
    }
    all += (i ? ", " : "") + std::string(names[i]);
  }
  refuse(name, "one of " + all, value);
}

template <class T>
void assign(T& field, const char* name, PyObject* value) {
  if constexpr (std::is_pointer_v<T>) {
    field = static_cast<T>(address(name, value));
  } else if constexpr (std::is_enum_v<T>) {
    field = enumerator<T>(name, value);
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!PyBool_Check(value)) refuse(name, "True or False", value);
    field = value == Py_True;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred())
      refuse_instead_of(PyExc_TypeError, name, "a number", value);
    field = T(number);
  } else {
    static_assert(std::is_integral_v<T>);
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred())
      refuse_instead_of(PyExc_TypeError, name, "an integer", value);
    field = T(number);
    if (field != number)
      throw py::value_error(std::string(name) + " is too large: " + std::to_string(number));
  }
}

// Any object, which its reader looks at.
inline void assign(py::handle& field, const char*, PyObject* value) { field = value; }

template <class Struct>
class Table;

// A table's struct as Python holds it, with a bit per field that is there.
template <class Struct>
struct Filled {
  Struct value{};
  uint64_t given = 0;
};

template <class Struct>
const Struct& complete(const Filled<Struct>& filled);

// Another struct that Python holds, which keeps it until the call has returned.
template <class Struct>
struct Held {
  const Struct* value;
};

template <class Struct>
void assign(Held<Struct>& field, const char* name, PyObject* value) {
  py::detail::make_caster<Filled<Struct>> caster;
  if (value == Py_None || !caster.load(value, false))
    refuse(name, std::string("a ") + Table<Struct>::get().name(), value);
  field.value = &complete(py::detail::cast_op<const Filled<Struct>&>(caster));
}

template <class Struct>
void assign(std::vector<Struct>& field, const char* name, PyObject* value) {
  if (!PyList_Check(value)) refuse(name, "a list", value);
  field.clear();
  for (const py::handle item : py::reinterpret_borrow<py::list>(value)) {
    Held<Struct> held;
    assign(held, name, item.ptr());
    field.push_back(*held.value);
  }
}

// To be specialised per struct: its table.
template <class Struct>
Table<Struct> describe();

template <class Struct>
class Table {
 public:
  explicit Table(const char* name) : name_(name) {}

  static const Table& get() {
    static const Table table = describe<Struct>();
    return table;
  }

  // A member of the struct or of one of its bases.
  template <class Member, class Owner>
  Table& field(const char* name, Member Owner::* member) {
    Struct example{};
    return add<Member>(name, offset_of(example, example.*member));
  }
  // An element of an array.
  template <class Element, size_t count, class Owner>
  Table& element(const char* name, Element (Owner::*member)[count], size_t index) {
    Struct example{};
    return add<Element>(name, offset_of(example, (example.*member)[index]));
  }

  const char* name() const { return name_; }

  void fill(Filled<Struct>& target, PyObject* const* values, PyObject* names) const {
    const Py_ssize_t count = names ? PyTuple_GET_SIZE(names) : 0;
    size_t next = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
      const size_t found = find(PyTuple_GET_ITEM(names, i), next);
      const Field& field = fields_[found];
      field.assign(reinterpret_cast<char*>(&target.value) + field.offset, field.name, values[i]);
      target.given |= uint64_t(1) << found;
      next = found + 1;
    }
  }

  void check(uint64_t given) const {
    if (const uint64_t missing = required_ & ~given; missing) {
      size_t first = 0;
      while (!(missing >> first & 1)) first++;
      throw py::type_error(std::string(name_) + " lacks " + fields_[first].name);
    }
  }

 private:
  using Assign = void (*)(void* field, const char* name, PyObject* value);

  struct Field {
    const char* name;
    PyObject* interned_name;
    ptrdiff_t offset;
    Assign assign;
  };

  template <class Member>
  static ptrdiff_t offset_of(const Struct& example, const Member& member) {
    return reinterpret_cast<const char*>(&member) - reinterpret_cast<const char*>(&example);
  }

  template <class Member>
  Table& add(const char* name, ptrdiff_t offset) {
    if (fields_.size() == 64) throw std::logic_error("a table has more fields than bits");
    required_ |= uint64_t(1) << fields_.size();
    fields_.push_back(
        {name, interned(name), offset, [](void* field, const char* name, PyObject* value) {
           fields::assign(*static_cast<Member*>(field), name, value);
         }});
    return *this;
  }

  size_t find(PyObject* name, size_t next) const {
    for (size_t i = next; i < fields_.size(); i++)
      if (fields_[i].interned_name == name) return i;
    for (size_t i = 0; i < fields_.size(); i++)
      if (PyUnicode_Compare(fields_[i].interned_name, name) == 0) return i;
    throw py::type_error(std::string(name_) + " has no " + std::string(py::str(name)));
  }

  const char* name_;
  std::vector<Field> fields_;
  uint64_t required_ = 0;
};

template <class Struct>
const Struct& complete(const Filled<Struct>& filled) {
  Table<Struct>::get().check(filled.given);
  return filled.value;
}

// C++ exceptions as Python's, by pybind11's rules.
template <class Function>
PyObject* guarded(Function function) noexcept {
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Struct>
void fill_from_call(Filled<Struct>& target, PyObject* const* values, Py_ssize_t positional,
                    PyObject* names) {
  const Table<Struct>& table = Table<Struct>::get();
  if (positional)
    throw py::type_error(std::string(table.name()) + " takes its fields by name alone");
  table.fill(target, values, names);
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

inline PyMethodDef method(const char* name, FastCall call) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
          METH_FASTCALL | METH_KEYWORDS, nullptr};
}

inline void add_function(py::module_& m, PyMethodDef& definition) {
  const auto function = py::reinterpret_steal<py::object>(
      PyCFunction_NewEx(&definition, nullptr, m.attr("__name__").ptr()));
  if (!function) throw py::error_already_set();
  m.add_object(definition.ml_name, function);
}

template <class Function>
struct Argument;
template <class Result_, class Struct_>
struct Argument<Result_ (*)(const Struct_&)> {
  using Result = Result_;
  using Struct = Struct_;
};

// m.NAME(**fields), the table's name: function(fields), whose result, if any, pybind11 converts.
template <auto function>
void add_call(py::module_& m) {
  using Struct = typename Argument<decltype(function)>::Struct;
  static PyMethodDef definition =
      method(Table<Struct>::get().name(),
             [](PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
               return guarded([&]() -> PyObject* {
                 Filled<Struct> call;
                 fill_from_call(call, values, positional, names);
                 using Result = typename Argument<decltype(function)>::Result;
                 if constexpr (std::is_void_v<Result>) {
                   function(complete(call));
                   Py_RETURN_NONE;
                 } else if constexpr (std::is_same_v<Result, py::object>) {
                   return function(complete(call)).release().ptr();
                 } else {
                   return py::cast(function(complete(call))).release().ptr();
                 }
               });
             });
  add_function(m, definition);
}

// m.NAME(**fields), the table's name, makes a value that other calls take.
template <class Struct>
void add_struct(py::module_& m) {
  const char* const name = Table<Struct>::get().name();
  const py::class_<Filled<Struct>> type(m, (std::string("_") + name).c_str(), py::module_local());
  static PyMethodDef make =
      method(name, [](PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
        return guarded([&] {
          Filled<Struct> filled;
          fill_from_call(filled, values, positional, names);
          return py::cast(std::move(filled)).release().ptr();
        });
      });
  add_function(m, make);
}

}  // namespace fields
