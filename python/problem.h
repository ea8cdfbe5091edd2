// The fields of csrc/problem.h's structs, for fields.h.
#pragma once

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

// The matrices and norms of a WeightSet or of a GroupGradient.
template <class Struct>
Table<Struct>& add_weights(Table<Struct>& table) {
  constexpr const char* names[] = {"weight_f", "weight_g", "weight_s",
                                   "weight_r", "weight_z", "weight_h"};
  for (int gate = 0; gate < mmixer::gates; gate++)
    table.element(names[gate], &Struct::weight, gate);
  return table.field("norm_weight", &Struct::norm_weight).field("norm_bias", &Struct::norm_bias);
}

// A single step's share of a Group and of a Problem, in a struct that derives from both.
template <class Struct>
Table<Struct>& add_step(Table<Struct>& table) {
  table.field("batch", &Struct::batch)
      .field("hidden", &Struct::hidden)
      .field("dtype", &Struct::dtype)
      .field("weight_dtype", &Struct::weight_dtype)
      .field("norm_dtype", &Struct::norm_dtype)
      .field("mix", &Struct::mix)
      .field("eps", &Struct::eps)
      .field("input", &Struct::input)
      .field("input_stride_sample", &Struct::input_stride_sample)
      .field("input_size", &Struct::input_size)
      .field("context", &Struct::context)
      .field("context_stride_sample", &Struct::context_stride_sample)
      .field("context_size", &Struct::context_size)
      .field("hx", &Struct::hx)
      .field("hx_stride_sample", &Struct::hx_stride_sample);
  return add_weights(table);
}

template <>
inline Table<mmixer::Group> describe() {
  Table<mmixer::Group> table("Group");
  table.field("input", &mmixer::Group::input)
      .field("input_stride_step", &mmixer::Group::input_stride_step)
      .field("input_stride_sample", &mmixer::Group::input_stride_sample)
      .field("input_size", &mmixer::Group::input_size)
      .field("context", &mmixer::Group::context)
      .field("context_stride_sample", &mmixer::Group::context_stride_sample)
      .field("context_size", &mmixer::Group::context_size);
  return add_weights(table);
}

template <>
inline Table<OwnProblem> describe() {
  return Table<OwnProblem>("Problem")
      .field("groups", &OwnProblem::list)
      .field("steps", &OwnProblem::steps)
      .field("batch", &OwnProblem::batch)
      .field("hidden", &OwnProblem::hidden)
      .field("mix", &OwnProblem::mix)
      .field("keep", &OwnProblem::keep)
      .field("eps", &OwnProblem::eps)
      .field("threads", &OwnProblem::threads)
      .field("dtype", &OwnProblem::dtype)
      .field("weight_dtype", &OwnProblem::weight_dtype)
      .field("norm_dtype", &OwnProblem::norm_dtype)
      .field("hx", &OwnProblem::hx)
      .field("hx_stride_group", &OwnProblem::hx_stride_group)
      .field("hx_stride_sample", &OwnProblem::hx_stride_sample)
      .field("lengths", &OwnProblem::lengths);
}

template <>
inline Table<mmixer::GroupGradient> describe() {
  using Struct = mmixer::GroupGradient;
  Table<Struct> table("GroupGradient");
  table.field("input", &Struct::input).field("context", &Struct::context);
  return add_weights(table);
}

// The cotangents of a backward, in a struct that derives from them.
template <class Struct>
Table<Struct>& add_cotangents(Table<Struct>& table) {
  return table.field("grad_output", &Struct::grad_output)
      .field("grad_output_stride_group", &Struct::grad_output_stride_group)
      .field("grad_output_stride_step", &Struct::grad_output_stride_step)
      .field("grad_output_stride_sample", &Struct::grad_output_stride_sample)
      .field("grad_h_n", &Struct::grad_h_n)
      .field("grad_h_n_stride_group", &Struct::grad_h_n_stride_group)
      .field("grad_h_n_stride_sample", &Struct::grad_h_n_stride_sample);
}

inline void bind_problem(py::module_& m) {
  add_struct<mmixer::Group>(m);
  add_struct<mmixer::GroupGradient>(m);
  add_struct<OwnProblem>(m);
}

}  // namespace fields
