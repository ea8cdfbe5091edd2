// The steps of a stream on the CPU: tensors are read once, and a step takes its input's address.
#pragma once

#include <algorithm>
#include <vector>

#include "../csrc/cpu/engine.h"
#include "pass.h"
#include "workspace.h"

namespace streams {

namespace py = pybind11;
using from_python::Form;
using from_python::Items;
using from_python::Layout;
using from_python::require;
using mmixer::Problem;

// In bytes; the CPU engine counts its memory in elements of Problem::dtype.
inline int64_t bytes(int64_t elements, const Problem& p) {
  return elements * from_python::bytes_of(p.dtype);
}

struct Open {
  py::handle call, layers;
  int threads;
};

// Layers of cells, each with the tensors of a step. A step writes each layer's next state over its
// hx; the layer above has that as its input. The context's share is computed once.
class Stream {
 public:
  explicit Stream(const Open& c) {
    const Form form(c.call);
    require(form.layout == Layout::step && form.keep == mmixer::Keep::nothing && form.has_hx,
            "call", "be a step from a state, which keeps nothing");
    const Items layers(c.layers.ptr());
    require(layers.size() > 0, "layers", "not be empty");
    for (int64_t i = 0; i < layers.size(); i++) {
      Layer& layer = layers_.emplace_back(form, layers[i]);
      Problem& p = layer.problem;
      p.threads = c.threads;
      mmixer::cpu::check(problem(layer));
      require(p.hx_stride_sample == p.hidden || p.batch == 1, "hx", "be contiguous");
      workspace_size_ =
          std::max(workspace_size_, bytes(mmixer::cpu::forward_workspace_size(problem(layer)), p));
    }
    if (!form.has_context) return;
    PyObject* const like = layers_[0].tensors[0];
    for (Layer& layer : layers_) {
      const Problem p = problem(layer);
      layer.share = passes::new_empty(like, nullptr, 2, p.batch, p.hidden);
      void* const share = passes::address(layer.share);
      // After all calls of Python, which may call an engine with the same memory.
      const Workspace workspace(workspace_size_);
      {
        const py::gil_scoped_release release;
        mmixer::cpu::context_share(p, share, workspace.get());
      }
      layer.problem.list[0].share = share;
    }
  }

  // Computes nothing where the input is not like that of the first layer.
  void step(py::handle input) {
    const Problem& first = layers_[0].problem;
    const from_python::Tensor<2> rows("input", input.ptr());
    require(rows.shape[0] == first.batch && rows.shape[1] == layers_[0].group().input_size &&
                rows.dtype == first.dtype,
            "input", "have the shape and dtype that the stream was opened with");
    const Workspace workspace(workspace_size_);
    const py::gil_scoped_release release;
    for (size_t i = 0; i < layers_.size(); i++) {
      Problem p = problem(layers_[i]);
      mmixer::Group group = layers_[i].group();
      if (i == 0) group.input = rows.address, group.input_stride_sample = rows.stride[0];
      p.group = &group;
      void* const state = const_cast<void*>(p.hx);
      mmixer::cpu::forward(p, {state, 0, 0, p.hidden, state}, nullptr, workspace.get());
    }
  }

 private:
  struct Layer {
    Items tensors;  // kept, as the problem has their addresses
    OwnProblem problem;
    py::object share;

    Layer(const Form& form, PyObject* operands)
        : tensors(operands), problem(from_python::problem(form, tensors)) {}
    const mmixer::Group& group() const { return problem.list[0]; }
  };

  static Problem problem(const Layer& layer) { return layer.problem.problem(); }

  std::vector<Layer> layers_;
  int64_t workspace_size_ = 0;
};

inline Stream open(const Open& c) { return Stream(c); }

}  // namespace streams

namespace fields {

template <>
inline Table<streams::Open> describe() {
  using Struct = streams::Open;
  return Table<Struct>("stream")
      .field("call", &Struct::call)
      .field("layers", &Struct::layers)
      .field("threads", &Struct::threads);
}

}  // namespace fields
