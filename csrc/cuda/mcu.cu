#include "mcu.h"

#include <algorithm>
#include <stdexcept>

#include "launch.h"
#include "prepare.h"
#include "prologue.h"
#include "recurrence.h"
#include "step.h"

namespace mmixer::cuda {
namespace {

template <class Arguments>
const Recurrence<Arguments>* find(const Recurrences<Arguments>& all, int H, int parts) {
  for (int i = 0; i < all.count; i++)
    if (all.first[i].parts == parts && all.first[i].H >= H) return &all.first[i];
  return nullptr;
}

Recurrences<ForwardArguments> recurrences(Path path, const ForwardArguments*) {
  return path == Path::cluster ? cluster_forward() : cooperative_forward();
}

Recurrences<BackwardArguments> recurrences(Path path, const BackwardArguments*) {
  return path == Path::cluster ? cluster_backward() : cooperative_backward();
}

template <class Arguments>
Plan plan(Path path, int H, int parts) {
  const auto* kernel = find(recurrences(path, static_cast<Arguments*>(nullptr)), H, parts);
  if (!kernel) return {0, 0, 0, "no kernel for H = " + std::to_string(H)};
  const Resident teams = kernel->resident_teams();
  if (teams.count == 0) return {0, 0, 0, teams.refusal};
  return {kernel->H, teams.count, kernel->packets * int64_t(sizeof(uint64_t)), ""};
}

template <class Arguments>
void run(Path path, int parts, int teams, Arguments arguments, void* stream) {
  const auto* kernel = find(recurrences(path, &arguments), arguments.H, parts);
  if (!kernel || teams < 1) throw std::runtime_error("there is no persistent kernel of this size");
  const int all = arguments.G * ((arguments.B + 7) / 8);
  // Clusters need not be resident at once: what does not fit waits for its turn.
  const int at_once = path == Path::cluster ? all : std::min(all, teams);
  for (int first = 0; first < all; first += at_once) {
    arguments.first_team = first;
    kernel->launch(arguments, std::min(at_once, all - first), stream);
  }
}

template <class Kernel>
void run_blocks(int blocks, const typename Kernel::Arguments& arguments, void* stream) {
  launch<Kernel>({blocks, 1, false, sizeof(typename Kernel::Shared), stream}, arguments);
}

template <class Kernel>
void run_rows(int blocks, const typename Kernel::Arguments& arguments, void* stream) {
  const int threads = 32 * row_warps(arguments.H);
  launch<Kernel>({blocks, 1, false, sizeof(typename Kernel::Shared), stream, threads}, arguments);
}

template <template <Dtype> class Kernel, class Arguments>
void run_rows(int blocks, const Arguments& arguments, Dtype dtype, void* stream) {
  switch (dtype) {
    case Dtype::float32: return run_rows<Kernel<Dtype::float32>>(blocks, arguments, stream);
    case Dtype::float64: return run_rows<Kernel<Dtype::float64>>(blocks, arguments, stream);
    case Dtype::bfloat16: return run_rows<Kernel<Dtype::bfloat16>>(blocks, arguments, stream);
    case Dtype::float16: return run_rows<Kernel<Dtype::float16>>(blocks, arguments, stream);
  }
}

}  // namespace

std::string refusal() { return refusal<NormTanh<Dtype::float32>>(); }

uint64_t stream_number(void* stream) { return number_of(stream); }

Plan plan(Path path, int H, int parts, bool backward) {
  return backward ? plan<BackwardArguments>(path, H, parts) : plan<ForwardArguments>(path, H, parts);
}

void forward(Path path, int parts, int teams, ForwardArguments arguments, void* stream) {
  run(path, parts, teams, arguments, stream);
}

void backward(Path path, int parts, int teams, BackwardArguments arguments, void* stream) {
  run(path, parts, teams, arguments, stream);
}

void prepare(const PrepareArguments& a, void* stream) {
  constexpr int columns = Prepare<Dtype::float32>::columns;
  const int blocks = a.count * gates * (((a.terms ? a.Hp : a.H) + columns - 1) / columns);
  switch (a.weight_dtype) {
    case Dtype::float32: return run_blocks<Prepare<Dtype::float32>>(blocks, a, stream);
    case Dtype::float64: return run_blocks<Prepare<Dtype::float64>>(blocks, a, stream);
    case Dtype::bfloat16: return run_blocks<Prepare<Dtype::bfloat16>>(blocks, a, stream);
    case Dtype::float16: return run_blocks<Prepare<Dtype::float16>>(blocks, a, stream);
  }
}

void norm_tanh(const NormTanhArguments& a, void* stream) {
  run_rows<NormTanh>(a.G * a.blocks, a, a.y_dtype, stream);
}

void norm_tanh_backward(const NormTanhBackwardArguments& a, void* stream) {
  run_rows<NormTanhBackward>(a.G * a.blocks, a, a.grad_a_dtype, stream);
}

void mix(const MixArguments& a, void* stream) {
  run_rows<Mix>(a.G * a.blocks, a, a.dtype, stream);
}

void mix_backward(const MixArguments& a, void* stream) {
  run_rows<MixBackward>(a.G * a.blocks, a, a.dtype, stream);
}

void reset_gate(const GateArguments& a, void* stream) {
  run_rows<ResetGate>(a.G * a.steps * a.B, a, a.dtype, stream);
}

void update_gate(const GateArguments& a, void* stream) {
  run_rows<UpdateGate>(a.G * a.steps * a.B, a, a.dtype, stream);
}

void update_gate_backward(const GateBackwardArguments& a, void* stream) {
  run_rows<UpdateGateBackward>(a.G * a.B, a, a.dtype, stream);
}

void reset_gate_backward(const GateBackwardArguments& a, void* stream) {
  run_rows<ResetGateBackward>(a.G * a.B, a, a.dtype, stream);
}

}  // namespace mmixer::cuda
