// The machine that runs the threads of some blocks as fibers, which switch to one another at
// synchronisations. What travels (store_async, packets) arrives later, in random order, between two
// switches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "../cuda/launch.h"
#include "arena.h"
#include "fiber.h"
#include "sanitizers.h"
#include "sites.h"

namespace mmixer::cuda::emulator {

constexpr int warp_size = 32;
constexpr uint32_t all_lanes = ~0u;

// A token that ThreadSanitizer releases and acquires, one for each of two rounds: slow threads may
// still have to acquire in one round when fast ones release in the next.
struct Token {
  char rounds[2];
  void* of(uint32_t round) { return &rounds[round & 1]; }
};

struct Block;
struct Warp;

struct Thread {
  Context context;
  Stack stack;
  void* shadow = nullptr;  // ThreadSanitizer's fiber
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;
  const Place* waits = nullptr;
  Thread* next_waiting = nullptr;
  int packets_in_flight = 0;
  bool exited = false;
  char sent = 0;  // a token: what the thread did before it sent something

  int lane() const { return index % warp_size; }
};

// The point where all threads of a warp, a block or a cluster meet.
struct Meeting {
  Thread* first = nullptr;
  int members = 0, arrived = 0, exited = 0;
  uint32_t round = 0;
  const Place* place = nullptr;
  Token token = {};
};

struct Warp {
  Meeting meeting;
  uint32_t ready = all_lanes;
  int position = 0;                 // in the list of ready warps
  uint32_t words[2][warp_size][7];  // of the lanes, by the parity of the meeting's round
  float product[2][16][8];
};

struct Block {
  Meeting meeting;
  Meeting* cluster = nullptr;
  int index = 0;
  char* shared = nullptr;
};

struct MbarrierState {
  Mbarrier* address;
  Block* block;
  const Thread* initialiser;
  int count, pending;
  int64_t bytes = 0;  // announced, less those delivered
  uint32_t phase = 0;
  bool fenced = false;
  Thread* waiting = nullptr;
  Token token = {};
};

struct AsyncStore {
  Thread* sender;
  Block* destination;
  uint32_t* p;
  Mbarrier* barrier;
  uint32_t words[4];
  int count;
};

constexpr int none = -1;

// A packet's 8 bytes, or 16: then there is a second half.
struct PacketValue {
  uint64_t half[2];
  int halves;
};

struct Packet {
  Thread* sender;
  uint64_t* p;
  PacketValue value;
  int next;  // to the same address
};

// The packets in flight. Those to one address arrive in the order of their stores, those to
// different addresses in random order.
class Packets {
 public:
  int addresses() const { return int(heads_.size()); }

  void add(Thread* sender, uint64_t* p, const PacketValue& value) {
    const int packet = take();
    pool_[packet] = {sender, p, value, none};
    const auto found = tails_.find(p);
    if (found == tails_.end()) {
      heads_.push_back(packet);
      tails_.emplace(p, packet);
    } else {
      pool_[found->second].next = packet;
      found->second = packet;
    }
  }

  Packet remove(int position) {
    const int packet = heads_[position];
    const Packet removed = pool_[packet];
    free_.push_back(packet);
    if (removed.next != none) {
      heads_[position] = removed.next;
    } else {
      heads_[position] = heads_.back();
      heads_.pop_back();
      tails_.erase(removed.p);
    }
    return removed;
  }

  // The position of the first packet to an address to which the thread has sent one, or none.
  int position_of(const Thread* sender, const uint64_t* p) const {
    if (tails_.find(p) == tails_.end()) return none;
    for (size_t i = 0; i < heads_.size(); ++i)
      if (pool_[heads_[i]].p == p)
        for (int packet = heads_[i]; packet != none; packet = pool_[packet].next)
          if (pool_[packet].sender == sender) return int(i);
    return none;
  }

 private:
  int take() {
    if (free_.empty()) {
      pool_.emplace_back();
      return int(pool_.size()) - 1;
    }
    const int packet = free_.back();
    free_.pop_back();
    return packet;
  }

  std::vector<Packet> pool_;
  std::vector<int> free_, heads_;
  std::unordered_map<const uint64_t*, int> tails_;
};

// One launch. A cooperative grid's blocks run all together, those of others cluster by cluster.
class Machine {
 public:
  Machine(const Grid& grid, int threads, detail::Entry entry, const void* arguments, Arena& arena,
          uint64_t seed);
  ~Machine();

  void run();
  bool failed() const { return failure_[0] != '\0'; }
  std::string failure() const { return failure_; }
  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...);

  // The requests of the running thread.
  Thread& self() { return *current_; }
  void sync(Meeting& meeting, const char* of, const Place* place);
  // The parity of the round to which all lanes have brought their words.
  int meet_in_warp(const Place* place, const uint32_t* words, int count);
  const Warp& warp() { return *current_->warp; }
  void store_packet(uint64_t* p, const PacketValue& value);
  void await_packet(const uint64_t* p, const Place* place);  // before a load of it
  void init(Mbarrier* barrier, int arrivals, const Place* place);
  void fence_inits();
  void expect(Mbarrier* barrier, int bytes, const Place* place);
  void wait(Mbarrier* barrier, uint32_t parity, const Place* place);
  void store_async(uint32_t* p, int rank, const uint32_t* words, int count, Mbarrier* barrier,
                   const Place* place);
  // The offset of p in the shared memory of the block, where all `size` bytes have to be.
  int offset_of(const void* p, size_t size, const char* what, const Place* place);

 private:
  static void enter();
  void run_blocks(int first, int count);
  void set_up(int first, int count);
  void tear_down();
  void exit_thread();
  void check_exit(Meeting& meeting, const char* of);

  uint64_t random();
  void reschedule(const Place* place, bool stay);
  void sometimes_yield();
  void switch_to(Thread& thread);
  void switch_to_launch();
  Thread* next(bool stay);
  Warp& choose_warp();
  void change_whims();
  bool starved(const Warp& warp) const;
  void make_ready(Warp& warp, uint32_t lanes);
  void make_unready(Warp& warp, int lane);
  void make_ready(Thread& thread) { make_ready(*thread.warp, 1u << thread.lane()); }
  void progress() { idle_loads_ = 0; }

  void join(Meeting& meeting, const char* of, const Place* place);
  void multiply(Warp& warp, int round);
  size_t in_flight() const { return stores_.size() + packets_.addresses(); }
  void deliver_any();
  void deliver(const AsyncStore& store);
  void deliver_packet(int position);
  MbarrierState& state_of(Mbarrier* barrier, const Block& block, const char* what);
  void complete_if_done(MbarrierState& state);
  std::string text_of_waits() const;

  const Grid grid_;
  const int threads_per_block_;
  const detail::Entry entry_;
  const void* const arguments_;
  Arena& arena_;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<Meeting> clusters_;
  std::deque<MbarrierState> mbarriers_;
  std::vector<AsyncStore> stores_;
  Packets packets_;

  std::vector<Warp*> ready_;
  Thread* current_ = nullptr;
  Warp* last_warp_ = nullptr;
  Context launch_;
  Stack launch_stack_;
  void* launch_shadow_ = nullptr;
  std::vector<void*> agents_;  // ThreadSanitizer's fibers that carry stores to each block
  void* packet_agent_ = nullptr;
  char all_exited_ = 0;

  uint64_t random_state_;
  const bool adversarial_;
  enum class Whim { favour_warp, starve_warp, starve_block } whim_ = Whim::favour_warp;
  int whim_left_ = 0, victim_ = 0;
  uint64_t delivery_interval_ = 64;
  int64_t idle_loads_ = 0;
  char failure_[2000] = "";
};

extern Machine* machine;  // of the launch that runs

}  // namespace mmixer::cuda::emulator
