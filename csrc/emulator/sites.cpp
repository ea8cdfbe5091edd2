#include "sites.h"

#include <algorithm>

#include "sanitizers.h"

namespace mmixer::cuda {
namespace emulator {
namespace {

bool is_synchronisation(Operation operation) { return operation < Operation::load_packet; }

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::block_sync: return "block_sync";
    case Operation::warp_sync: return "warp_sync";
    case Operation::cluster_sync: return "cluster_sync";
    case Operation::mbarrier_wait: return "mbarrier_wait";
    case Operation::packet_ready: return "packet_ready";
    case Operation::load_packet: return "load_packet";
    case Operation::shuffle: return "shuffle_xor";
    case Operation::multiply_add: return "multiply_add";
    case Operation::other: break;
  }
  return "";
}

std::string text_of(const Site& site, Operation operation, int offset) {
  std::string text = site.file;
  text.erase(0, text.find_last_of('/') + 1);
  text += ":" + std::to_string(site.line);
  if (operation != Operation::other) text = text + " " + name_of(operation);
  return offset == no_offset ? text : text + " +" + std::to_string(offset);
}

}  // namespace

Places places;

Place::Place(const Site& site, Operation operation, int offset)
    : site(site), operation(operation), offset(offset), name(text_of(site, operation, offset)) {}

Place* Places::find(const Site& site, Operation operation, int offset) {
  if (places_.size() * 2 >= table_.size()) grow();
  size_t slot = hash(site, operation, offset);
  for (;; slot = (slot + 1) & (table_.size() - 1)) {
    if (!table_[slot]) table_[slot] = add(site, operation, offset);
    if (table_[slot]->is(site, operation, offset)) return table_[slot]->first;
  }
}

void Places::set_fault(const Fault& fault) {
  fault_ = fault;
  for (Place& place : places_) place.fault = fault_at(place);
}

std::vector<std::string> Places::names() const {
  std::vector<std::string> names;
  for (const Place& place : places_)
    if (is_synchronisation(place.operation)) names.push_back(place.name);
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return names;
}

void Places::clear() {
  places_.clear();
  table_.assign(table_.size(), nullptr);
}

size_t Places::hash(const Site& site, Operation operation, int offset) const {
  uint64_t key = reinterpret_cast<uintptr_t>(site.file) * 31 + site.line;
  key = (key * 31 + uint64_t(operation)) * 0x9e3779b97f4a7c15u + uint64_t(offset);
  key *= 0x9e3779b97f4a7c15u;
  return size_t(key >> 40) & (table_.size() - 1);
}

Fault::Kind Places::fault_at(const Place& place) const {
  const bool fits = fault_.kind == Fault::flip_parity ? place.operation == Operation::mbarrier_wait
                                                      : is_synchronisation(place.operation);
  return fits && place.name == fault_.site ? fault_.kind : Fault::none;
}

Place* Places::add(const Site& site, Operation operation, int offset) {
  const tsan::Unseen unseen;
  Place& place = places_.emplace_back(site, operation, offset);
  place.fault = fault_at(place);
  for (Place& other : places_)
    if (other.name == place.name) {
      place.first = &other;
      break;
    }
  return &place;
}

void Places::grow() {
  const tsan::Unseen unseen;
  table_.assign(std::max<size_t>(256, table_.size() * 2), nullptr);
  for (Place& place : places_) {
    size_t slot = hash(place.site, place.operation, place.offset);
    while (table_[slot]) slot = (slot + 1) & (table_.size() - 1);
    table_[slot] = &place;
  }
}

}  // namespace emulator

std::vector<std::string> sites() { return emulator::places.names(); }
void clear_sites() { emulator::places.clear(); }

}  // namespace mmixer::cuda
