// _limits: the limits of this machine, and the recurrence's time in a call of the CPU engine.
#include "../../csrc/cpu/engine.h"
#include "../../python/problem.h"
#include "limits.h"

namespace py = pybind11;
using namespace mmixer;

namespace {

const cpu::Limits& limits() {
#ifdef MMIXER_X86
  if (cpu::instruction_set() == "avx512") return cpu::avx512::limits;
  if (cpu::instruction_set() == "avx2") return cpu::avx2::limits;
#endif
  return cpu::baseline::limits;
}

struct RecurrenceSeconds {
  fields::Held<OwnProblem> problem;
  float *output, *workspace;
};

double recurrence_seconds(const RecurrenceSeconds& call) {
  const Problem problem = call.problem.value->problem();
  const py::gil_scoped_release release;
  return limits().recurrence_seconds(problem, call.output, call.workspace);
}

}  // namespace

template <>
fields::Table<RecurrenceSeconds> fields::describe() {
  return Table<RecurrenceSeconds>("recurrence_seconds")
      .field("problem", &RecurrenceSeconds::problem)
      .field("output", &RecurrenceSeconds::output)
      .field("workspace", &RecurrenceSeconds::workspace);
}

PYBIND11_MODULE(_limits, m) {
  fields::add_struct<Group>(m);
  fields::add_struct<OwnProblem>(m);
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
