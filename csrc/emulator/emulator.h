// What a test may set and ask of the emulator. One launch runs at a time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmixer::cuda {

// A defect, put in at one synchronisation (a name out of sites()) to see that a test notices.
struct Fault {
  enum Kind {
    none,
    skip,         // the synchronisation does nothing; packet_ready takes any packet
    flip_parity,  // mbarrier_wait waits for the other parity
    stale,        // packet_ready takes any packet
  };
  Kind kind = none;
  std::string site;
};

struct Options {
  // adversarial: for a while, favours a warp, or holds back a warp or a block, and hurries or
  // delays what is in flight.
  enum class Schedule { random, adversarial };
  uint64_t seed = 1;  // with the number of launches since it was set, seeds the schedule
  Schedule schedule = Schedule::random;
  int resident_clusters = 8;
  int resident_blocks = 132;
  Fault fault;
};

Options& options();

// The synchronisations that kernels have met since clear_sites(): "file.h:12 block_sync", and with
// the barrier's place in shared memory "file.h:34 mbarrier_wait +128". Sorted.
std::vector<std::string> sites();
void clear_sites();

// Switches between fibers so far, of all launches.
uint64_t thread_switches();

}  // namespace mmixer::cuda
