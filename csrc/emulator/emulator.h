// The settings of the emulator and what it tells a test. One launch runs at a time.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace mmixer::cuda {

// A defect, planted at one synchronisation (a name out of sites()) to see that a test notices it.
struct Fault {
  enum Kind {
    none,
    skip,         // the synchronisation does nothing; packet_ready takes any packet
    flip_parity,  // mbarrier_wait waits for the other parity
  };
  Kind kind = none;
  std::string site;
};

struct Options {
  // An adversarial schedule for a while favours a warp, or holds back a warp or a block, and
  // hurries or delays what is in flight.
  enum class Schedule { random, adversarial };
  uint64_t seed = 1;  // of the schedule, with the number of launches since it was set
  Schedule schedule = Schedule::random;
  int resident_clusters = 8;
  int resident_blocks = 132;
  bool run = true;              // false: what is launched is counted and computes nothing
  bool product_kernel = false;  // multiply runs product_kernel.h, not loops on the CPU
  Fault fault;
};

Options& options();

// The synchronisations that kernels have met since clear_sites(): "file.h:12 block_sync", and with
// the barrier's place in shared memory "file.h:34 mbarrier_wait +128". Sorted.
std::vector<std::string> sites();
void clear_sites();

// Counts something that a device would be given to do on a stream. Its name has to live as long as
// the program.
void count(std::string_view what, void* stream);

// How often what was launched since clear_launches(): kernels, by their names without namespaces
// and template arguments, "clear" and "product".
std::map<std::string, int64_t> launches();

// The streams that it was launched on.
std::set<void*> streams();
void clear_launches();

}  // namespace mmixer::cuda
