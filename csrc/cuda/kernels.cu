#include "kernels.h"

#include <algorithm>
#include <stdexcept>

#include "finish.h"
#include "launch.h"
#include "prepare.h"
#include "prologue.h"
#include "recurrence.h"
#include "step.h"
#include "sums.h"

namespace mmixer::cuda {
namespace {

Recurrences<ForwardArguments> recurrences(Path path, const ForwardArguments*) {
  switch (path) {
    case Path::cluster: return cluster_forward();
    case Path::cooperative: return cooperative_forward();
    default: return wide_forward();
  }
}

Recurrences<BackwardArguments> recurrences(Path path, const BackwardArguments*) {
  switch (path) {
    case Path::cluster: return cluster_backward();
    case Path::cooperative: return cooperative_backward();
    default: return wide_backward();
  }
}

// The smallest kernel of a variant that holds H, or null.
template <class Arguments>
const Recurrence<Arguments>* find(const Variant& variant, int H) {
  for (const auto& kernel : recurrences(variant.path, static_cast<Arguments*>(nullptr)))
    if (kernel.samples == variant.samples && kernel.terms == variant.terms &&
        kernel.term_dtype == variant.term_dtype && kernel.H >= H)
      return &kernel;
  return nullptr;
}

template <class Arguments>
Plan plan(const Variant& variant, int H) {
  const auto* kernel = find<Arguments>(variant, H);
  if (!kernel)
    return {0, 0, 0,
            "no kernel for H = " + std::to_string(H) + " with " + std::to_string(variant.terms) +
                " terms"};
  const Resident teams = kernel->resident_teams();
  if (teams.count == 0) return {0, 0, 0, teams.refusal};
  return {kernel->H, teams.count, kernel->packets, ""};
}

template <class Arguments>
void run(const Variant& variant, int teams, Arguments arguments, bool are_zero, void* stream) {
  const auto* kernel = find<Arguments>(variant, arguments.H);
  if (!kernel || teams < 1) throw std::runtime_error("there is no persistent kernel of this size");
  const int all = arguments.G * ((arguments.B + variant.samples - 1) / variant.samples);
  // Clusters need not be resident at once: those that do not fit wait for their turn.
  const int at_once = variant.path == Path::cluster ? all : std::min(all, teams);
  for (int first = 0; first < all; first += at_once) {
    arguments.first_team = first;
    const int count = std::min(at_once, all - first);
    if (kernel->packets && (first > 0 || !are_zero))
      clear(arguments.packets, count * kernel->packets, stream);
    kernel->launch(arguments, count, stream);
  }
}

template <class Kernel>
void run_blocks(const typename Kernel::Arguments& arguments, void* stream) {
  const int blocks = Kernel::blocks(arguments);
  if (blocks == 0) return;
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
    case Dtype::int8: break;  // `check` refuses it
  }
}

template <Dtype weight_dtype>
void prepare(const PrepareArguments& a, void* stream) {
  using Kernel = Prepare<weight_dtype>;
  if (Kernel::blocks(a) == 0) return;
  launch<Kernel>({Kernel::blocks(a), 1, false, Kernel::shared_bytes(a), stream}, a);
}

}  // namespace

std::string refusal() { return refusal<NormTanh<Dtype::float32>>(); }

uint64_t stream_number(void* stream) { return number_of(stream); }

Plan plan(const Variant& variant, int H, bool backward) {
  return backward ? plan<BackwardArguments>(variant, H) : plan<ForwardArguments>(variant, H);
}

int64_t packets_size(const Variant& variant, int64_t teams, int H, bool backward) {
  const auto of = [&](const auto* kernel) { return kernel ? teams * kernel->packets : 0; };
  return backward ? of(find<BackwardArguments>(variant, H))
                  : of(find<ForwardArguments>(variant, H));
}

int padded_size(const Variant& variant, int H, bool backward) {
  const auto of = [](const auto* kernel) { return kernel ? kernel->H : 0; };
  return backward ? of(find<BackwardArguments>(variant, H))
                  : of(find<ForwardArguments>(variant, H));
}

void recurrence(const Variant& variant, int teams, const ForwardArguments& arguments,
                bool packets_are_zero, void* stream) {
  run(variant, teams, arguments, packets_are_zero, stream);
}

void recurrence_backward(const Variant& variant, int teams, const BackwardArguments& arguments,
                         bool packets_are_zero, void* stream) {
  run(variant, teams, arguments, packets_are_zero, stream);
}

void prepare(const PrepareArguments& a, void* stream) {
  switch (a.weight_dtype) {
    case Dtype::float32: return prepare<Dtype::float32>(a, stream);
    case Dtype::float64: return prepare<Dtype::float64>(a, stream);
    case Dtype::bfloat16: return prepare<Dtype::bfloat16>(a, stream);
    case Dtype::float16: return prepare<Dtype::float16>(a, stream);
    case Dtype::int8: break;  // `check` refuses it
  }
}

void norm_tanh(const NormTanhArguments& a, void* stream) {
  run_rows<NormTanh>(a.G * (a.part[0].blocks + a.part[1].blocks), a, a.dtype, stream);
}

void norm_tanh_backward(const NormTanhBackwardArguments& a, void* stream) {
  run_rows<NormTanhBackward>(a.G * (a.part[0].blocks + a.part[1].blocks), a, a.dtype, stream);
}

void mix(const MixArguments& a, void* stream) { run_rows<Mix>(a.G * a.blocks, a, a.dtype, stream); }

void mix_backward(const MixArguments& a, void* stream) {
  run_rows<MixBackward>(a.G * a.blocks, a, a.dtype, stream);
}

void step_sum(const StepSumArguments& a, void* stream) {
  switch (a.dtype) {
    case Dtype::float32: return run_blocks<StepSum<Dtype::float32>>(a, stream);
    case Dtype::float64: return run_blocks<StepSum<Dtype::float64>>(a, stream);
    case Dtype::bfloat16: return run_blocks<StepSum<Dtype::bfloat16>>(a, stream);
    case Dtype::float16: return run_blocks<StepSum<Dtype::float16>>(a, stream);
    case Dtype::int8: break;  // `check` refuses it
  }
}

void finish(const FinishArguments& a, void* stream) {
  if (a.dtype == Dtype::float64)
    run_blocks<Finish<Dtype::float64>>(a, stream);
  else
    run_blocks<Finish<Dtype::float32>>(a, stream);
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
