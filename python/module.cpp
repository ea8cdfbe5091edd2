// mmixer_kernels._native: addresses and sizes in, calls of csrc/ out. No logic, no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cpu/mcu.h"
#include "../csrc/cpu/team.h"
#include "cuda.h"

namespace py = pybind11;
using namespace mmixer::cpu;

namespace {

using Address = std::uintptr_t;
// A tensor's address and its strides, in elements.
using Strided3 = std::array<int64_t, 4>;
using Strided2 = std::array<int64_t, 3>;
// input, its strides of step and sample, input_size; context, its stride of sample, context_size;
// the eight tensors of a weight set, 0 for a norm that there is not.
using GroupTuple = std::array<int64_t, 15>;
// input or 0; context; the eight tensors of a weight set, 0 where not wanted.
using GradientTuple = std::array<int64_t, 10>;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<Address>(address));
}

struct Call {
  std::array<int64_t, 4> sizes;  // G, T, B, H
  bool concat, bfloat16_weights, bfloat16_norms, recompute;
  double eps;
  int threads;
  std::vector<GroupTuple> groups;
  Strided2 hx;
  int64_t lengths;
};

Call make_call(std::array<int64_t, 4> sizes, bool concat, std::array<bool, 2> bfloat16,
               bool recompute, double eps, int threads, std::vector<GroupTuple> groups,
               Strided2 hx, int64_t lengths) {
  for (const int64_t size : sizes)
    if (size < 1) throw std::invalid_argument("sizes must be positive");
  if (int64_t(groups.size()) != sizes[0])
    throw std::invalid_argument("groups must have one entry a weight set");
  for (const GroupTuple& group : groups)
    if (group[3] < 1 || group[6] < 1)
      throw std::invalid_argument("input_size and context_size must be positive");
  return {sizes,   concat, bfloat16[0], bfloat16[1], recompute, eps,
          threads, std::move(groups), hx, lengths};
}

// A Problem and the groups that it points to.
template <class T>
struct Arguments {
  std::vector<Group<T>> groups;
  Problem<T> problem;

  explicit Arguments(const Call& call) {
    for (const GroupTuple& t : call.groups)
      groups.push_back({pointer<const T>(t[0]), t[1], t[2], t[3], pointer<const T>(t[4]), t[5],
                        t[6], pointer<const void>(t[7]), pointer<const void>(t[8]),
                        pointer<const void>(t[9]), pointer<const void>(t[10]),
                        pointer<const void>(t[11]), pointer<const void>(t[12]),
                        pointer<const void>(t[13]), pointer<const void>(t[14])});
    problem = {call.sizes[0],
               call.sizes[1],
               call.sizes[2],
               call.sizes[3],
               call.concat ? Mix::concat : Mix::gated,
               call.bfloat16_weights,
               call.bfloat16_norms,
               call.recompute,
               T(call.eps),
               std::min(call.threads, available_processors()),
               groups.data(),
               pointer<const T>(call.hx[0]),
               call.hx[1],
               call.hx[2],
               pointer<const int64_t>(call.lengths),
               nullptr};
  }
};

template <class T>
void run_forward(const Call& call, int64_t output, int64_t h_n, int64_t saved, int64_t workspace) {
  const Arguments<T> arguments(call);
  forward<T>(arguments.problem, pointer<T>(output), pointer<T>(h_n), pointer<T>(saved),
             pointer<T>(workspace));
}

template <class T>
void run_backward(const Call& call, Strided3 grad_output, Strided2 grad_h_n, int64_t saved,
                  const std::vector<GradientTuple>& gradients, int64_t grad_hx,
                  int64_t workspace) {
  if (gradients.size() != call.groups.size())
    throw std::invalid_argument("gradients must have one entry a weight set");
  const Arguments<T> arguments(call);
  std::vector<GroupGradient<T>> gradient;
  for (const GradientTuple& t : gradients)
    gradient.push_back({pointer<T>(t[0]), pointer<T>(t[1]), pointer<T>(t[2]), pointer<T>(t[3]),
                        pointer<T>(t[4]), pointer<T>(t[5]), pointer<T>(t[6]), pointer<T>(t[7]),
                        pointer<T>(t[8]), pointer<T>(t[9])});
  backward<T>(arguments.problem,
              {pointer<const T>(grad_output[0]), grad_output[1], grad_output[2], grad_output[3]},
              {pointer<const T>(grad_h_n[0]), grad_h_n[1], 0, grad_h_n[2]},
              pointer<const T>(saved), gradient.data(), pointer<T>(grad_hx),
              pointer<T>(workspace));
}

// One step of one weight set: a call of forward with less around it.
template <class T>
struct Step {
  Group<T> group{};
  Problem<T> problem{};

  Step(int64_t batch, int64_t input_size, int64_t context_size, int64_t hidden) {
    if (batch < 1 || input_size < 1 || context_size < 1 || hidden < 1)
      throw std::invalid_argument("sizes must be positive");
    group.input_size = input_size;
    group.context_size = context_size;
    problem.groups = problem.steps = 1;
    problem.batch = batch;
    problem.hidden = hidden;
    problem.group = &group;
  }
};

// A tensor's address and its stride of sample.
using Strided1 = std::array<int64_t, 2>;

template <class T>
void run_step(const std::array<int64_t, 4>& sizes, bool concat, std::array<bool, 2> bfloat16,
              double eps, int threads, Strided1 input, Strided1 context,
              const std::array<int64_t, 8>& weights, Strided1 hx, int64_t next_state,
              int64_t workspace) {
  Step<T> step(sizes[0], sizes[1], sizes[2], sizes[3]);
  Group<T>& group = step.group;
  group.input = pointer<const T>(input[0]);
  group.input_stride_sample = input[1];
  group.context = pointer<const T>(context[0]);
  group.context_stride_sample = context[1];
  const void** target[] = {&group.weight_f, &group.weight_g, &group.weight_s,
                           &group.weight_r, &group.weight_z, &group.weight_h,
                           &group.norm_weight, &group.norm_bias};
  for (int i = 0; i < 8; i++) *target[i] = pointer<const void>(weights[i]);
  Problem<T>& problem = step.problem;
  problem.mix = concat ? Mix::concat : Mix::gated;
  problem.bfloat16_weights = bfloat16[0];
  problem.bfloat16_norms = bfloat16[1];
  problem.eps = T(eps);
  problem.threads = std::min(threads, available_processors());
  problem.hx = pointer<const T>(hx[0]);
  problem.hx_stride_sample = hx[1];
  T* state = pointer<T>(next_state);  // output and h_n: the same values
  forward<T>(problem, state, state, nullptr, pointer<T>(workspace));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Call>(m, "Call").def(py::init(&make_call));
  m.def("saved_size", [](bool is_double, const Call& call) {
    return is_double ? saved_size(Arguments<double>(call).problem)
                     : saved_size(Arguments<float>(call).problem);
  });
  m.def("forward_workspace_size", [](bool is_double, const Call& call, bool save) {
    return is_double ? forward_workspace_size(Arguments<double>(call).problem, save)
                     : forward_workspace_size(Arguments<float>(call).problem, save);
  });
  m.def("backward_workspace_size", [](bool is_double, const Call& call, bool need_weights) {
    return is_double ? backward_workspace_size(Arguments<double>(call).problem, need_weights)
                     : backward_workspace_size(Arguments<float>(call).problem, need_weights);
  });
  m.def(
      "forward",
      [](bool is_double, const Call& call, int64_t output, int64_t h_n, int64_t saved,
         int64_t workspace) {
        (is_double ? run_forward<double> : run_forward<float>)(call, output, h_n, saved,
                                                               workspace);
      },
      Release());
  m.def(
      "backward",
      [](bool is_double, const Call& call, Strided3 grad_output, Strided2 grad_h_n, int64_t saved,
         const std::vector<GradientTuple>& gradients, int64_t grad_hx, int64_t workspace) {
        (is_double ? run_backward<double> : run_backward<float>)(
            call, grad_output, grad_h_n, saved, gradients, grad_hx, workspace);
      },
      Release());
  m.def("step_workspace_size", [](bool is_double, int64_t batch, int64_t input_size,
                                  int64_t context_size, int64_t hidden) {
    const auto size = [](const auto& step) { return forward_workspace_size(step.problem, false); };
    return is_double ? size(Step<double>(batch, input_size, context_size, hidden))
                     : size(Step<float>(batch, input_size, context_size, hidden));
  });
  m.def("step", [](bool is_double, int64_t batch, int64_t input_size, int64_t context_size,
                   int64_t hidden, bool concat, std::array<bool, 2> bfloat16, double eps,
                   int threads, Strided1 input, Strided1 context, std::array<int64_t, 8> weights,
                   Strided1 hx, int64_t next_state, int64_t workspace) {
    const py::gil_scoped_release release;
    (is_double ? run_step<double> : run_step<float>)(
        {batch, input_size, context_size, hidden}, concat, bfloat16, eps, threads, input, context,
        weights, hx, next_state, workspace);
  });
  // For benchmarks: the seconds of the recurrence in a call of forward, and the machine's limits.
  m.def(
      "recurrence_seconds",
      [](const Call& call, int64_t output, int64_t h_n, int64_t workspace) {
        Arguments<float> arguments(call);
        double seconds = 0;
        arguments.problem.recurrence_seconds = &seconds;
        forward<float>(arguments.problem, pointer<float>(output), pointer<float>(h_n), nullptr,
                       pointer<float>(workspace));
        return seconds;
      },
      Release());
  m.def("multiply_add", multiply_add, Release());
  m.def(
      "read",
      [](int64_t memory, int64_t size, int64_t rounds, int threads) {
        read(pointer<const float>(memory), size, rounds, threads);
      },
      Release());
  m.def("use_instruction_set", [](const std::string& name) {
    if (!use_instruction_set(name))
      throw std::invalid_argument("this build or processor has no instruction set " + name);
  });
#ifdef MMIXER_CUDA_BUILD
  py::module_ cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
#endif
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = MMIXER_COMPILER;
    info["build_type"] = MMIXER_BUILD_TYPE;
    info["instruction_sets"] = MMIXER_INSTRUCTION_SETS;
    info["instruction_sets_here"] = instruction_sets();
#ifdef MMIXER_OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#ifdef MMIXER_CUDA_BUILD
    info["cuda"] = MMIXER_CUDA_BUILD;
#else
    info["cuda"] = false;
#endif
    info["instruction_set"] = instruction_set();
    info["processors"] = available_processors();
    return info;
  });
}
