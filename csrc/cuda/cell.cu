#include "cell.h"

#include <algorithm>
#include <stdexcept>

#include "engine.h"
#include "launch.h"

namespace mmixer::cuda {
namespace {

template <class Kernel>
CellPlan plan(int B, int F, int C, int H) {
  const int most = (H + Kernel::warps - 1) / Kernel::warps;  // blocks per team: each warp has a row
  const auto teams = [&](int samples) { return (B + samples - 1) / samples; };
  std::string refusal;
  for (int samples = std::min(B, cell_samples); samples > 0; samples--) {
    const Resident blocks = resident_blocks<Kernel>(Kernel::shared_bytes(samples, F, C, H));
    if (blocks.count < teams(samples)) {
      refusal = blocks.count ? std::to_string(teams(samples)) + " teams, " +
                                   std::to_string(blocks.count) + " blocks at once"
                             : blocks.refusal;
      continue;
    }
    // Fewer samples per team are better as long as each block has a processor of its own: another
    // sample costs a team more than another team costs the L2 cache. Teams then get one size.
    while (samples > 1 && teams(samples - 1) * most <= processors()) samples--;
    const int count = teams(samples);
    return {(B + count - 1) / count, std::min(blocks.count / count, most),
            count * int64_t(sizeof(uint64_t)), ""};
  }
  return {0, 0, 0, refusal};
}

template <class Kernel>
void run(const CellArguments& a, void* stream) {
  const int teams = (a.B + a.team_samples - 1) / a.team_samples;
  const size_t bytes = Kernel::shared_bytes(a.team_samples, a.F, a.C, a.H);
  launch<Kernel>({teams * a.blocks, 1, true, bytes, stream}, a);
}

// Calls function(Kernel*) with the kernel of these types.
template <class Function>
auto with_kernel(Dtype dtype, Dtype weight_dtype, Function function) {
  if (dtype == Dtype::float64) return function(static_cast<Cell<double, Dtype::float64>*>(nullptr));
  switch (weight_dtype) {
    case Dtype::float32: return function(static_cast<Cell<float, Dtype::float32>*>(nullptr));
    case Dtype::bfloat16: return function(static_cast<Cell<float, Dtype::bfloat16>*>(nullptr));
    case Dtype::float16: return function(static_cast<Cell<float, Dtype::float16>*>(nullptr));
    default: throw std::runtime_error("float64 weights need float64 features");
  }
}

}  // namespace

CellPlan cell_plan(const Problem& p, const Group& group) {
  constexpr int64_t most = 1 << 24;  // so that sums of sizes, which are ints here, are exact
  for (const int64_t size : {p.batch, p.hidden, group.input_size, group.context_size})
    if (size > most) return {0, 0, 0, "a size of " + std::to_string(size)};
  const int H = int(p.hidden);
  CellPlan result = with_kernel(p.dtype, p.weight_dtype, [&](auto* kernel) {
    return plan<std::remove_pointer_t<decltype(kernel)>>(int(p.batch), int(group.input_size),
                                                         int(group.context_size), H);
  });
  result.workspace *=
      p.dtype == Dtype::float64 ? cell_workspace<double>(H) : cell_workspace<float>(H);
  return result;
}

void cell(const Problem& p, const Group& group, const CellPlan& plan, void* next_state,
          void* workspace, void* stream) {
  CellArguments a{};
  static_cast<WeightSet&>(a) = group;
  a.input = group.input, a.input_stride = group.input_stride_sample;
  a.context = group.context, a.context_stride = group.context_stride_sample;
  a.hx = p.hx, a.hx_stride = p.hx_stride_sample;
  a.next_state = next_state, a.workspace = static_cast<uint64_t*>(workspace);
  a.dtype = p.dtype, a.weight_dtype = p.weight_dtype, a.norm_dtype = p.norm_dtype;
  a.B = int(p.batch), a.F = int(group.input_size), a.C = int(group.context_size);
  a.H = int(p.hidden);
  a.team_samples = plan.team_samples, a.blocks = plan.blocks;
  a.mix = p.mix, a.eps = p.eps;
  with_kernel(a.dtype, a.weight_dtype,
              [&](auto* kernel) { run<std::remove_pointer_t<decltype(kernel)>>(a, stream); });
}

}  // namespace mmixer::cuda
