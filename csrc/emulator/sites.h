// The call sites of the device layer: their names, and which of them has a fault planted.
#pragma once

#include <cstddef>
#include <deque>
#include <string>
#include <vector>

#include "../cuda/device.h"
#include "emulator.h"

namespace mmixer::cuda::emulator {

enum class Operation {
  block_sync,
  warp_sync,
  cluster_sync,
  mbarrier_wait,
  packet_ready,
  // The operations below are no synchronisations that a fault could change.
  load_packet,
  shuffle,
  multiply_add,
  other,
};

constexpr int no_offset = -1;

// A call site, for mbarrier_wait with the barrier's offset in shared memory, in bytes.
struct Place {
  Site site;
  Operation operation;
  int offset;
  Fault::Kind fault = Fault::none;
  const std::string name;
  Place* first = this;  // of the same name: one file's name may have several addresses

  Place(const Site& site, Operation operation, int offset);
  Place(const Place&) = delete;

  bool is(const Site& other, Operation by, int at) const {
    return site.file == other.file && site.line == other.line && operation == by && offset == at;
  }
};

// All call sites that kernels have met, in a hash table: every call looks its site up.
class Places {
 public:
  Place* find(const Site& site, Operation operation, int offset = no_offset);
  void set_fault(const Fault& fault);
  std::vector<std::string> names() const;  // those of synchronisations, sorted
  void clear();

 private:
  size_t hash(const Site& site, Operation operation, int offset) const;
  Fault::Kind fault_at(const Place& place) const;
  Place* add(const Site& site, Operation operation, int offset);
  void grow();

  std::deque<Place> places_;
  std::vector<Place*> table_;
  Fault fault_;
};

extern Places places;

}  // namespace mmixer::cuda::emulator
