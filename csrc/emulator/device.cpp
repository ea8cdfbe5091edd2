// The functions of device.h and launch.h, and the checks of a launch. Each call goes to the machine
// that runs, with the site that it comes from.
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "machine.h"

namespace mmixer::cuda {

using namespace emulator;

namespace {

uint64_t next_seed() {
  static uint64_t seed = 0, launches = 0;
  if (seed != options().seed) launches = 0;
  seed = options().seed;
  uint64_t x = seed * 0x9e3779b97f4a7c15u + ++launches;  // mixed as in splitmix64
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

[[noreturn]] void refuse(const std::string& why) {
  throw std::runtime_error("the kernel cannot be launched: " + why);
}

void check(const Grid& grid, int threads) {
  const auto text = [](auto x) { return std::to_string(x); };
  if (grid.blocks <= 0 || grid.cluster <= 0) refuse("a grid without blocks");
  if (grid.cluster > 16) refuse("a cluster of " + text(grid.cluster) + " blocks");
  if (grid.blocks % grid.cluster != 0)
    refuse(text(grid.blocks) + " blocks in clusters of " + text(grid.cluster));
  if (threads <= 0 || threads % warp_size != 0) refuse(text(threads) + " threads");
  if (grid.shared_bytes > detail::largest_shared_memory)
    refuse(text(grid.shared_bytes) + " bytes of shared memory");
  if (grid.cooperative && grid.blocks > options().resident_blocks)
    refuse(text(grid.blocks) + " blocks are to be resident, and " +
           text(options().resident_blocks) + " fit");
}

// While it lives, calls of the device layer go to a machine.
struct Running {
  explicit Running(Machine& running) { machine = &running; }
  ~Running() { machine = nullptr; }
};

}  // namespace

namespace detail {

void run(std::string_view name, const Grid& grid, int threads, Entry entry, const void* arguments) {
  static std::mutex mutex;
  static Arena arena;
  const std::lock_guard<std::mutex> lock(mutex);
  check(grid, threads);
  count(name, grid.stream);
  if (!options().run) return;
  const tsan::Unseen unseen;
  places.set_fault(options().fault);
  const auto emulated =
      std::make_unique<Machine>(grid, threads, entry, arguments, arena, next_seed());
  const Running running(*emulated);
  emulated->run();
  if (emulated->failed()) throw std::runtime_error(emulated->failure());
}

void fail_misaligned(const void* p, int bytes) {
  machine->fail("an access of %d bytes to %p, which is not aligned", bytes, p);
}

}  // namespace detail

Options& options() {
  static Options options;
  return options;
}

namespace {

std::mutex counting;
std::map<std::string_view, int64_t> counts;
std::set<void*> streams_seen;

}  // namespace

void count(std::string_view what, void* stream) {
  const std::lock_guard<std::mutex> lock(counting);
  ++counts[what];
  streams_seen.insert(stream);
}

std::map<std::string, int64_t> launches() {
  const std::lock_guard<std::mutex> lock(counting);
  return {counts.begin(), counts.end()};
}

std::set<void*> streams() {
  const std::lock_guard<std::mutex> lock(counting);
  return streams_seen;
}

void clear_launches() {
  const std::lock_guard<std::mutex> lock(counting);
  counts.clear(), streams_seen.clear();
}

int thread_index() { return machine->self().index; }
int block_index() { return machine->self().block->index; }

void block_sync(Site site) {
  const Place* const place = places.find(site, Operation::block_sync);
  if (place->fault == Fault::none) machine->sync(machine->self().block->meeting, "block", place);
}

void cluster_sync(Site site) {
  const Place* const place = places.find(site, Operation::cluster_sync);
  if (place->fault == Fault::none) machine->sync(*machine->self().block->cluster, "cluster", place);
}

void warp_sync(Site site) {
  const Place* const place = places.find(site, Operation::warp_sync);
  if (place->fault == Fault::none) machine->meet_in_warp(place, nullptr, 0);
}

namespace {

template <class T>
T shuffle(T x, int mask, const Site& site) {
  constexpr int count = sizeof(T) / sizeof(uint32_t);
  const Place* const place = places.find(site, Operation::shuffle);
  if (mask < 0 || mask >= warp_size) machine->fail("%s: a mask of %d", place->name.c_str(), mask);
  uint32_t words[count];
  std::memcpy(words, &x, sizeof x);
  const int round = machine->meet_in_warp(place, words, count);
  std::memcpy(&x, machine->warp().words[round][machine->self().lane() ^ mask], sizeof x);
  return x;
}

template <class T>
void send(T* p, int rank, const T& x, Mbarrier* barrier, const Site& site) {
  uint32_t words[sizeof x / sizeof(uint32_t)];
  std::memcpy(words, &x, sizeof x);
  machine->store_async(reinterpret_cast<uint32_t*>(p), rank, words, int(std::size(words)), barrier,
                       places.find(site, Operation::other));
}

}  // namespace

float shuffle_xor(float x, int mask, Site site) { return shuffle(x, mask, site); }
double shuffle_xor(double x, int mask, Site site) { return shuffle(x, mask, site); }

template <bool half>
void multiply_add(float (&c)[4], const Word4& a, uint32_t b0, uint32_t b1, Site site) {
  const uint32_t words[] = {a.word[0], a.word[1], a.word[2], a.word[3], b0, b1, half};
  const Place* const place = places.find(site, Operation::multiply_add);
  const int round = machine->meet_in_warp(place, words, int(std::size(words)));
  const int row = machine->self().lane() / 4, column = machine->self().lane() % 4 * 2;
  for (int i = 0; i < 4; ++i)
    c[i] += machine->warp().product[round][row + i / 2 * 8][column + i % 2];
}

template void multiply_add<false>(float (&c)[4], const Word4&, uint32_t, uint32_t, Site);
template void multiply_add<true>(float (&c)[4], const Word4&, uint32_t, uint32_t, Site);

void store_packet(uint64_t* p, uint32_t data, uint32_t tag) {
  detail::check_aligned(p, sizeof *p);
  machine->store_packet(p, {{uint64_t(tag) << 32 | data}, 1});
}

void store_packet(Word4* p, const uint32_t (&data)[3], uint32_t tag) {
  detail::check_aligned(p, sizeof *p);
  machine->store_packet(reinterpret_cast<uint64_t*>(p),
                        {{uint64_t(data[1]) << 32 | data[0], uint64_t(tag) << 32 | data[2]}, 2});
}

uint64_t load_packet(const uint64_t* p, Site site) {
  detail::check_aligned(p, sizeof *p);
  machine->await_packet(p, places.find(site, Operation::load_packet));
  return tsan::load_relaxed(p);
}

Word4 load_packet(const Word4* p, Site site) {
  detail::check_aligned(p, sizeof *p);
  const auto* const halves = reinterpret_cast<const uint64_t*>(p);
  machine->await_packet(halves, places.find(site, Operation::load_packet));
  const uint64_t half[] = {tsan::load_relaxed(halves), tsan::load_relaxed(halves + 1)};
  Word4 packet;
  std::memcpy(&packet, half, sizeof packet);
  return packet;
}

bool packet_ready(uint64_t packet, uint32_t tag, Site site) {
  const Place* const place = places.find(site, Operation::packet_ready);
  return place->fault != Fault::none || packet >> 32 == tag;
}

bool packet_ready(const Word4& packet, uint32_t tag, Site site) {
  return packet_ready(uint64_t(packet.word[3]) << 32, tag, site);
}

void mbarrier_init(Mbarrier* barrier, int arrivals, Site site) {
  tsan::write(barrier, sizeof *barrier);
  machine->init(barrier, arrivals, places.find(site, Operation::other));
}

void mbarrier_init_fence() { machine->fence_inits(); }

void mbarrier_expect(Mbarrier* barrier, int bytes, Site site) {
  machine->expect(barrier, bytes, places.find(site, Operation::other));
}

void mbarrier_wait(Mbarrier* barrier, uint32_t parity, Site site) {
  const Place* const somewhere = places.find(site, Operation::other);
  const int offset = machine->offset_of(barrier, sizeof *barrier, "mbarrier", somewhere);
  const Place* const place = places.find(site, Operation::mbarrier_wait, offset);
  if (place->fault == Fault::skip) return;
  machine->wait(barrier, place->fault == Fault::flip_parity ? parity ^ 1 : parity, place);
}

void store_async(float* p, int rank, float x, Mbarrier* barrier, Site site) {
  send(p, rank, x, barrier, site);
}

void store_async(Word4* p, int rank, const Word4& x, Mbarrier* barrier, Site site) {
  send(p, rank, x, barrier, site);
}

}  // namespace mmixer::cuda
