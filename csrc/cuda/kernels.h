// The kernels of a pass, each on the caller's stream, on the current device.
#pragma once

#include "arguments.h"
#include "engine.h"

namespace mmixer::cuda {

// The padded hidden size of a persistent kernel, and the bytes of packets of so many teams at once;
// 0 where there is no such kernel.
int padded_size(const Variant& variant, int H, bool backward);
int64_t packets_size(const Variant& variant, int64_t teams, int H, bool backward);

// Each runs the whole batch, at most `teams` teams at a time, whose packets arguments.packets has
// room for. These have to be zero first, and are cleared unless they are said to be.
void recurrence(const Variant& variant, int teams, const ForwardArguments& arguments,
                bool packets_are_zero, void* stream);
void recurrence_backward(const Variant& variant, int teams, const BackwardArguments& arguments,
                         bool packets_are_zero, void* stream);

void prepare(const PrepareArguments& arguments, void* stream);
void norm_tanh(const NormTanhArguments& arguments, void* stream);
void norm_tanh_backward(const NormTanhBackwardArguments& arguments, void* stream);
void mix(const MixArguments& arguments, void* stream);
void mix_backward(const MixArguments& arguments, void* stream);
void step_sum(const StepSumArguments& arguments, void* stream);
void finish(const FinishArguments& arguments, void* stream);
void reset_gate(const GateArguments& arguments, void* stream);
void update_gate(const GateArguments& arguments, void* stream);
void update_gate_backward(const GateBackwardArguments& arguments, void* stream);
void reset_gate_backward(const GateBackwardArguments& arguments, void* stream);

}  // namespace mmixer::cuda
