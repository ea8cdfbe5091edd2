// The layouts that are compiled, smallest first. Weights that do not fit into 255 registers per
// thread lie in shared memory: 227 KiB per block on Hopper, 99 KiB on Ada.
#pragma once

#include "backward.h"
#include "forward.h"
#include "launch.h"
#include "recurrence.h"

namespace mmixer::cuda {

template <class... Items>
struct List {};

template <int samples, Dtype term_dtype>
using OneTermInCluster = List<
    // Layout<H, blocks, warps, terms, resident tiles, samples, term_dtype>
    Layout<128, 4, 8, 1, 3, samples, term_dtype>, Layout<256, 8, 8, 1, 3, samples, term_dtype>,
    Layout<512, 16, 8, 1, 3, samples, term_dtype>, Layout<768, 16, 12, 1, 1, samples, term_dtype>>;

template <int samples>
using MoreTermsInCluster = List<
    // Layout<H, blocks, warps, terms, resident tiles, samples>
    Layout<128, 4, 8, 2, 6, samples>, Layout<256, 8, 8, 2, 6, samples>,
    Layout<512, 16, 8, 2, 2, samples>, Layout<128, 4, 8, 3, 9, samples>,
    Layout<256, 8, 8, 3, 6, samples>>;

template <int samples, Dtype term_dtype>
using OneTermThroughL2 = List<
    // Layout<H, blocks, warps, terms, resident tiles, samples, term_dtype>
    Layout<128, 4, 8, 1, 3, samples, term_dtype>, Layout<256, 8, 8, 1, 3, samples, term_dtype>,
    Layout<512, 16, 8, 1, 3, samples, term_dtype>, Layout<768, 48, 8, 1, 3, samples, term_dtype>,
    Layout<1024, 64, 8, 1, 2, samples, term_dtype>>;

template <int samples>
using MoreTermsThroughL2 = List<
    // Layout<H, blocks, warps, terms, resident tiles, samples>
    Layout<128, 4, 8, 2, 6, samples>, Layout<256, 8, 8, 2, 6, samples>,
    Layout<512, 32, 8, 2, 6, samples>, Layout<1024, 64, 8, 2, 3, samples>,
    Layout<128, 4, 8, 3, 9, samples>, Layout<256, 8, 8, 3, 6, samples>,
    Layout<512, 32, 8, 3, 5, samples>>;

// Packets of 16 bytes take twice as many registers: one tile fewer lies there at H = 512.
template <int samples>
using Wide = List<
    // Layout<H, blocks, warps, terms, resident tiles, samples>
    Layout<128, 4, 8, 1, 3, samples>, Layout<256, 8, 8, 1, 3, samples>,
    Layout<512, 16, 8, 1, 2, samples>>;

template <template <int, Dtype> class OneTerm, template <int> class MoreTerms>
using ForwardLayouts =
    List<OneTerm<8, Dtype::bfloat16>, OneTerm<4, Dtype::bfloat16>, OneTerm<8, Dtype::float16>,
         OneTerm<4, Dtype::float16>, MoreTerms<8>, MoreTerms<4>>;

// Backward has no float16: its range may not hold a gradient.
template <template <int, Dtype> class OneTerm, template <int> class MoreTerms>
using BackwardLayouts =
    List<OneTerm<8, Dtype::bfloat16>, OneTerm<4, Dtype::bfloat16>, MoreTerms<8>, MoreTerms<4>>;

template <class Kernel>
constexpr size_t team_bytes = Kernel::Exchange::packets * sizeof(typename Kernel::Exchange::Packet);

template <class Kernel, class L>
Resident resident_teams() {
  constexpr size_t shared = sizeof(typename Kernel::Shared);
  if (Kernel::needs_cluster) return resident_clusters<Kernel>(L::C, shared);
  const Resident blocks = resident_blocks<Kernel>(shared);
  if (blocks.count > 0 && blocks.count < L::C)
    return {0, "a team has " + std::to_string(L::C) + " blocks, and this GPU runs " +
                   std::to_string(blocks.count) + " at once"};
  return {blocks.count / L::C, blocks.refusal};
}

template <class Kernel, class L>
void launch_teams(const typename Kernel::Arguments& arguments, int teams, void* stream) {
  constexpr int cluster = Kernel::needs_cluster ? L::C : 1;
  launch<Kernel>({teams * L::C, cluster, !Kernel::needs_cluster, sizeof(typename Kernel::Shared),
                  stream},
                 arguments);
}

// Appends Kernel<L, Path> for every layout L.
template <template <class, class> class Kernel, class Path, class Arguments, class... Layouts>
void append(std::vector<Recurrence<Arguments>>& all, List<Layouts...>) {
  (all.push_back({Layouts::H, Layouts::terms, Layouts::samples, Layouts::term_dtype,
                  int64_t(team_bytes<Kernel<Layouts, Path>>),
                  resident_teams<Kernel<Layouts, Path>, Layouts>,
                  launch_teams<Kernel<Layouts, Path>, Layouts>}),
   ...);
}

template <template <class, class> class Kernel, class Path, class Arguments, class... Lists>
std::vector<Recurrence<Arguments>> recurrences(List<Lists...>) {
  std::vector<Recurrence<Arguments>> all;
  (append<Kernel, Path>(all, Lists()), ...);
  return all;
}

}  // namespace mmixer::cuda
