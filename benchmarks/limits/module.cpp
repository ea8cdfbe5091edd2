// _limits: the limits of this machine, and the recurrence's time in a call of the CPU engine.
#include "../../csrc/cpu/engine.h"
#include "../../python/pass.h"
#include "limits.h"

namespace py = pybind11;
using namespace mmixer;

namespace {

const cpu::Limits& limits() {
#ifdef MMIXER_AVX512
  if (cpu::instruction_set() == "avx512") return cpu::avx512::limits;
#endif
#ifdef MMIXER_AVX2
  if (cpu::instruction_set() == "avx2") return cpu::avx2::limits;
#endif
  return cpu::baseline::limits;
}

struct RecurrenceSeconds {
  py::handle call, tensors;
  int threads;
  float* output;
};

double recurrence_seconds(const RecurrenceSeconds& c) {
  const from_python::Items tensors(c.tensors.ptr());
  const OwnProblem own = from_python::problem(from_python::Form(c.call), tensors);
  Problem problem = own.problem();
  from_python::require(problem.groups == 1, "groups", "be 1");
  const int64_t step = problem.batch * problem.hidden;
  const Results results{c.output, problem.steps * step, step, problem.hidden, nullptr};
  problem.threads = c.threads;
  const py::object workspace =
      passes::new_bytes(tensors[0], cpu::forward_workspace_size(problem) * int64_t(sizeof(float)));
  float* const scratch = static_cast<float*>(passes::address(workspace));
  const py::gil_scoped_release release;
  return limits().recurrence_seconds(problem, results, scratch);
}

}  // namespace

template <>
fields::Table<RecurrenceSeconds> fields::describe() {
  return Table<RecurrenceSeconds>("recurrence_seconds")
      .field("call", &RecurrenceSeconds::call)
      .field("tensors", &RecurrenceSeconds::tensors)
      .field("threads", &RecurrenceSeconds::threads)
      .field("output", &RecurrenceSeconds::output);
}

PYBIND11_MODULE(_limits, m) {
  fields::add_call<recurrence_seconds>(m);
  m.def("multiply_add", [](int64_t rounds, int threads) {
    const py::gil_scoped_release release;
    return limits().multiply_add(rounds, threads);
  });
  m.def("read", [](std::uintptr_t memory, int64_t size, int64_t rounds, int threads) {
    const py::gil_scoped_release release;
    limits().read(reinterpret_cast<const float*>(memory), size, rounds, threads);
  });
}
