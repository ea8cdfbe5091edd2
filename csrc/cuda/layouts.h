// The layouts that are compiled, smallest first. What does not fit into 255 registers a thread lies in
// shared memory: 227 KiB a block on Hopper, 99 KiB on Ada.
#pragma once

#include "backward.h"
#include "forward.h"
#include "launch.h"
#include "recurrence.h"

namespace mmixer::cuda {

template <class... Items>
struct List {};

using ClusterLayouts =
    List<Layout<128, 4, 4, 1, 6>, Layout<256, 8, 8, 1, 6>, Layout<512, 16, 8, 1, 6>,
         Layout<768, 16, 8, 1, 3>,                                                     // bfloat16
         Layout<128, 4, 4, 2, 10>, Layout<256, 8, 8, 2, 12>, Layout<512, 16, 8, 2, 5>,  // 2^-16
         Layout<128, 4, 4, 3, 12>, Layout<256, 8, 8, 3, 12>>;                           // float32

using CooperativeLayouts =
    List<Layout<128, 4, 4, 1, 6>, Layout<256, 8, 8, 1, 6>, Layout<512, 16, 8, 1, 6>,
         Layout<768, 48, 8, 1, 3>, Layout<1024, 64, 8, 1, 3>,  // bfloat16
         Layout<128, 4, 4, 2, 8>, Layout<256, 8, 8, 2, 12>, Layout<512, 32, 8, 2, 6>,
         Layout<1024, 64, 8, 2, 3>,                                                        // 2^-16
         Layout<128, 8, 4, 3, 9>, Layout<256, 8, 8, 3, 12>, Layout<512, 32, 8, 3, 7>>;  // float32

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
  if (Kernel::Exchange::packets)
    clear(arguments.packets, size_t(teams) * Kernel::Exchange::packets * sizeof(uint64_t), stream);
  constexpr int cluster = Kernel::needs_cluster ? L::C : 1;
  launch<Kernel>({teams * L::C, cluster, !Kernel::needs_cluster, sizeof(typename Kernel::Shared),
                  stream},
                 arguments);
}

// Kernel<L, Exchange> of every layout.
template <template <class, template <class, class, class> class> class Kernel,
          template <class, class, class> class Exchange, class Arguments, class... Layouts>
Recurrences<Arguments> recurrences(List<Layouts...>) {
  static const Recurrence<Arguments> all[] = {
      {Layouts::H, Layouts::parts, Kernel<Layouts, Exchange>::Exchange::packets,
       resident_teams<Kernel<Layouts, Exchange>, Layouts>,
       launch_teams<Kernel<Layouts, Exchange>, Layouts>}...};
  return {all, sizeof...(Layouts)};
}

}  // namespace mmixer::cuda
