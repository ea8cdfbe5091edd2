// The host side of a kernel, on a CPU. Blocks (clusters, if there are any) run one after another,
// those of a cooperative launch together.
#pragma once

#include <cstring>
#include <string>
#include <string_view>

#include "../cuda/device.h"
#include "emulator.h"

namespace mmixer::cuda {

namespace detail {

constexpr size_t largest_shared_memory = 227 * 1024;

using Entry = void (*)(void* shared, const void* arguments);

void run(std::string_view name, const Grid& grid, int threads, Entry entry, const void* arguments);

template <class Kernel>
constexpr std::string_view name_of() {
  std::string_view name = __PRETTY_FUNCTION__;  // ends with "[with Kernel = space::Name<...>; ...]"
  constexpr std::string_view before = "Kernel = ";
  name.remove_prefix(name.find(before) + before.size());
  name = name.substr(0, name.find_first_of("<;]"));
  return name.substr(name.rfind(':') + 1);
}

}  // namespace detail

// Throws std::runtime_error where a device would hang, trap or go wrong.
template <class Kernel>
void launch(const Grid& grid, const typename Kernel::Arguments& arguments) {
  static_assert(Kernel::threads > 0 && Kernel::threads <= 1024 && Kernel::threads % 32 == 0);
  const detail::Entry entry = [](void* shared, const void* arguments) {
    Kernel::run(shared, *static_cast<const typename Kernel::Arguments*>(arguments));
  };
  constexpr std::string_view name = detail::name_of<Kernel>();
  detail::run(name, grid, grid.threads ? grid.threads : Kernel::threads, entry, &arguments);
}

inline Resident resident(int count, size_t shared_bytes) {
  if (shared_bytes > detail::largest_shared_memory) return {0, "too much shared memory"};
  return {count, count ? "" : "the emulator was told to run none"};
}

template <class Kernel>
Resident resident_clusters(int /*cluster*/, size_t shared_bytes) {
  return resident(options().resident_clusters, shared_bytes);
}

template <class Kernel>
Resident resident_blocks(size_t shared_bytes) {
  return resident(options().resident_blocks, shared_bytes);
}

inline int processors() { return options().resident_blocks; }

template <class Kernel>
std::string refusal() {
  return "";
}

inline uint64_t number_of(void* stream) { return reinterpret_cast<uintptr_t>(stream); }

inline void clear(void* p, size_t bytes, void* stream) {
  count("clear", stream);
  if (options().run) std::memset(p, 0, bytes);
}

}  // namespace mmixer::cuda
