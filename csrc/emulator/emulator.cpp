// Runs CUDA threads as fibers that switch to one another at synchronisations. What travels
// (store_async, packets) arrives later, in random order, between two switches.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <unordered_map>

#include "../cuda/launch.h"

// ThreadSanitizer takes each fiber for a thread, and learns here what orders memory. This file is
// compiled without -fsanitize=thread: its own accesses are not to be seen.
#ifdef MMIXER_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
long __tsan_atomic64_load(const volatile long* address, int order);
void __tsan_atomic64_store(volatile long* address, long value, int order);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace mmixer::cuda {
namespace {

namespace tsan {

#ifdef MMIXER_EMULATOR_TSAN
constexpr bool enabled = true;
constexpr int most_fibers = 7000;  // the sanitizer has room for 8128 threads
constexpr unsigned without_order = 1;
constexpr int relaxed = 0;

void* this_fiber() { return __tsan_get_current_fiber(); }
void* create() { return __tsan_create_fiber(0); }
void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, without_order); }
void acquire(void* token) { __tsan_acquire(token); }
void release(void* token) { __tsan_release(token); }
void read(void* p, size_t size) { __tsan_read_range(p, size); }
void write(void* p, size_t size) { __tsan_write_range(p, size); }

uint64_t load_relaxed(const uint64_t* p) {
  return __tsan_atomic64_load(reinterpret_cast<const volatile long*>(p), relaxed);
}

void store_relaxed(uint64_t* p, uint64_t x) {
  __tsan_atomic64_store(reinterpret_cast<volatile long*>(p), long(x), relaxed);
}

// While it lives, what a fiber allocates and frees for the emulator is not taken for its accesses.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
constexpr bool enabled = false;
constexpr int most_fibers = 0;

void* this_fiber() { return nullptr; }
void* create() { return nullptr; }
void destroy(void*) {}
void switch_to(void*) {}
void acquire(void*) {}
void release(void*) {}
void read(void*, size_t) {}
void write(void*, size_t) {}
uint64_t load_relaxed(const uint64_t* p) { return *reinterpret_cast<const volatile uint64_t*>(p); }
void store_relaxed(uint64_t* p, uint64_t x) { *reinterpret_cast<volatile uint64_t*>(p) = x; }

struct Unseen {
  Unseen() {}
};
#endif

}  // namespace tsan
}  // namespace
}  // namespace mmixer::cuda

namespace mmixer::cuda {
namespace {

// AddressSanitizer has to know which stack is in use.
struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
};

#ifdef __SANITIZE_ADDRESS__
void before_switch(const Stack& to) {
  __sanitizer_start_switch_fiber(nullptr, to.bottom, to.size);
}
Stack after_switch() {
  Stack from;
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
  return from;
}
#else
void before_switch(const Stack&) {}
Stack after_switch() { return {}; }
#endif

}  // namespace
}  // namespace mmixer::cuda

#ifdef __x86_64__

// Saves what the ABI has a callee keep, and the stack pointer in *from; then goes on from `to`.
extern "C" void mmixer_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl mmixer_emulator_switch
.hidden mmixer_emulator_switch
.type mmixer_emulator_switch, @function
mmixer_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size mmixer_emulator_switch, . - mmixer_emulator_switch
.popsection
)");

namespace mmixer::cuda {
namespace {

class Context {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    constexpr int saved_registers = 6;
    void** top = reinterpret_cast<void**>(stack + size - 64);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - saved_registers;
  }

  void switch_to(Context& other) { mmixer_emulator_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

}  // namespace
}  // namespace mmixer::cuda

#else

#include <ucontext.h>

namespace mmixer::cuda {
namespace {

class Context {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_ = {};
};

}  // namespace
}  // namespace mmixer::cuda

#endif

namespace mmixer::cuda {
namespace {

enum class Operation {
  block_sync,
  warp_sync,
  cluster_sync,
  mbarrier_wait,
  packet_ready,
  // Those below are no synchronisations that a fault could change.
  load_packet,
  shuffle,
  multiply_add,
  other,
};

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

constexpr int no_offset = -1;

// A call site, for mbarrier_wait with the barrier's offset.
struct Place {
  Site site;
  Operation operation;
  int offset;
  Fault::Kind fault = Fault::none;
  const std::string name;
  Place* first = this;  // of the same name: one file's name may have several addresses

  Place(const Site& site, Operation operation, int offset)
      : site(site), operation(operation), offset(offset), name(text()) {}
  Place(const Place&) = delete;

  bool is(const Site& other, Operation by, int at) const {
    return site.file == other.file && site.line == other.line && operation == by && offset == at;
  }

  std::string text() const {
    std::string text = site.file;
    text.erase(0, text.find_last_of('/') + 1);
    text += ":" + std::to_string(site.line);
    if (operation != Operation::other) text = text + " " + name_of(operation);
    return offset == no_offset ? text : text + " +" + std::to_string(offset);
  }
};

Fault::Kind effect(const Fault& fault, Operation operation) {
  const bool fits = fault.kind == Fault::flip_parity ? operation == Operation::mbarrier_wait
                    : fault.kind == Fault::stale     ? operation == Operation::packet_ready
                                                     : operation < Operation::load_packet;
  return fits ? fault.kind : Fault::none;
}

class Places {
 public:
  Place* find(const Site& site, Operation operation, int offset = no_offset) {
    if (places_.size() * 2 >= table_.size()) grow();
    size_t slot = hash(site, operation, offset);
    for (;; slot = (slot + 1) & (table_.size() - 1)) {
      if (!table_[slot]) table_[slot] = add(site, operation, offset);
      if (table_[slot]->is(site, operation, offset)) return table_[slot]->first;
    }
  }

  void set_fault(const Fault& fault) {
    fault_ = fault;
    for (Place& place : places_) place.fault = fault_at(place);
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Place& place : places_)
      if (place.operation < Operation::load_packet) names.push_back(place.name);
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    return names;
  }

  void clear() {
    places_.clear();
    table_.assign(table_.size(), nullptr);
  }

 private:
  size_t hash(const Site& site, Operation operation, int offset) const {
    uint64_t key = reinterpret_cast<uintptr_t>(site.file) * 31 + site.line;
    key = (key * 31 + uint64_t(operation)) * 0x9e3779b97f4a7c15u + uint64_t(offset);
    key *= 0x9e3779b97f4a7c15u;
    return size_t(key >> 40) & (table_.size() - 1);
  }

  Fault::Kind fault_at(const Place& place) const {
    const Fault::Kind kind = effect(fault_, place.operation);
    return kind != Fault::none && place.name == fault_.site ? kind : Fault::none;
  }

  Place* add(const Site& site, Operation operation, int offset) {
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

  void grow() {
    const tsan::Unseen unseen;
    table_.assign(std::max<size_t>(256, table_.size() * 2), nullptr);
    for (Place& place : places_) {
      size_t slot = hash(place.site, place.operation, place.offset);
      while (table_[slot]) slot = (slot + 1) & (table_.size() - 1);
      table_[slot] = &place;
    }
  }

  std::deque<Place> places_;
  std::vector<Place*> table_;
  Fault fault_;
};

Places places;

constexpr int warp_size = 32;
constexpr uint32_t all_lanes = ~0u;

// For ThreadSanitizer, something to release and acquire; in two, as the slow may still have to
// acquire of one round when the fast release in the next.
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

// Where all of some threads meet.
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
  uint32_t words[2][warp_size][7];  // what the lanes bring to a meeting, by its round
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

// Of 8 bytes, or of 16: then there is a second half.
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

// Packets in flight: in random order over addresses, in that of their stores at each.
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

// Memory for the stacks and the shared memory of some blocks.
class Arena {
 public:
  static constexpr size_t page = 4096, red_zone = 256;
  static constexpr size_t stack_bytes = (tsan::enabled ? 256 : 64) << 10;

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { release(); }

  void reserve(int threads, int blocks, size_t shared_bytes) {
    shared_bytes_ = shared_bytes;
    stride_ = (shared_bytes + 127) / 128 * 128 + red_zone;
    const size_t shared = (blocks * stride_ + page - 1) / page * page;
    // A new mapping has no history for ThreadSanitizer.
    if (tsan::enabled || threads > threads_ || shared > shared_) {
      release();
      map(std::max(threads, threads_), std::max(shared, shared_));
    }
    ASAN_UNPOISON_MEMORY_REGION(memory_, size());
    for (int i = 0; i < blocks; ++i) {
      std::memset(shared_of(i), 0xff, shared_bytes);
      std::memset(shared_of(i) + shared_bytes, pattern, stride_ - shared_bytes);
      ASAN_POISON_MEMORY_REGION(shared_of(i) + shared_bytes, stride_ - shared_bytes);
    }
  }

  char* stack_of(int thread) const { return memory_ + shared_ + thread * stack_bytes + page; }
  size_t stack_size() const { return stack_bytes - page; }
  char* shared_of(int block) const { return memory_ + block * stride_; }

  bool red_zone_intact(int block) const {
    ASAN_UNPOISON_MEMORY_REGION(shared_of(block) + shared_bytes_, stride_ - shared_bytes_);
    const char* const zone = shared_of(block);
    return std::all_of(zone + shared_bytes_, zone + stride_, [](char c) { return c == pattern; });
  }

 private:
  static constexpr char pattern = 0x5a;
  static constexpr int most_guards = 16000;  // Linux has 65530 mappings for a process

  size_t size() const { return shared_ + threads_ * stack_bytes; }

  void map(int threads, size_t shared) {
    const size_t size = shared + threads * stack_bytes;
    void* const memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    threads_ = threads;
    shared_ = shared;
    if (threads <= most_guards)
      for (int i = 0; i < threads; ++i) mprotect(stack_of(i) - page, page, PROT_NONE);
  }

  void release() {
    if (!memory_) return;
    ASAN_UNPOISON_MEMORY_REGION(memory_, size());
    munmap(memory_, size());
    memory_ = nullptr;
  }

  char* memory_ = nullptr;
  int threads_ = 0;
  size_t shared_ = 0, shared_bytes_ = 0, stride_ = 0;
};

uint64_t switches = 0;

class Machine {
 public:
  Machine(const Grid& grid, int threads, detail::Entry entry, const void* arguments, Arena& arena,
          uint64_t seed);
  ~Machine();

  void run();
  bool failed() const { return failure_[0] != '\0'; }
  std::string failure() const { return failure_; }
  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...);

  // What the running thread asks for.
  Thread& self() { return *current_; }
  const Grid& grid() const { return grid_; }
  void sync(Meeting& meeting, const char* of, const Place* place);
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

Machine* machine = nullptr;

Machine::Machine(const Grid& grid, int threads, detail::Entry entry, const void* arguments,
                 Arena& arena, uint64_t seed)
    : grid_(grid),
      threads_per_block_(threads),
      entry_(entry),
      arguments_(arguments),
      arena_(arena),
      random_state_(seed | 1),
      adversarial_(options().schedule == Options::Schedule::adversarial) {
  launch_shadow_ = tsan::this_fiber();
  packet_agent_ = tsan::create();
}

Machine::~Machine() { tsan::destroy(packet_agent_); }

uint64_t Machine::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_ >> 8;
}

void Machine::run() {
  const int together = grid_.cooperative ? grid_.blocks : grid_.cluster;
  for (int first = 0; first < grid_.blocks && !failed(); first += together)
    run_blocks(first, together);
  // Not before: it would order the blocks.
  tsan::acquire(&all_exited_);
}

void Machine::run_blocks(int first, int count) {
  set_up(first, count);
  switch_to(*next(false));
  current_ = nullptr;
  for (int i = 0; i < count; ++i)
    if (!arena_.red_zone_intact(i) && !failed())
      std::snprintf(failure_, sizeof failure_, "block %d wrote beyond its shared memory",
                    blocks_[i].index);
  tear_down();
}

void Machine::set_up(int first, int count) {
  const int threads = count * threads_per_block_;
  if (tsan::enabled && threads + count > tsan::most_fibers)
    throw std::runtime_error("ThreadSanitizer has no room for " + std::to_string(threads) +
                             " threads at once");
  arena_.reserve(threads, count, grid_.shared_bytes);
  // All anew, so that ThreadSanitizer does not know the tokens of the blocks before.
  threads_ = std::vector<Thread>(threads);
  warps_ = std::vector<Warp>(threads / warp_size);
  blocks_ = std::vector<Block>(count);
  clusters_ = std::vector<Meeting>(count / grid_.cluster);
  std::deque<MbarrierState>().swap(mbarriers_);
  agents_.resize(count);
  ready_.clear();
  last_warp_ = nullptr;

  const auto meeting_of = [&](int first_thread, int members) {
    Meeting meeting;
    meeting.first = &threads_[first_thread];
    meeting.members = members;
    return meeting;
  };
  const int threads_per_cluster = grid_.cluster * threads_per_block_;
  for (size_t i = 0; i < clusters_.size(); ++i)
    clusters_[i] = meeting_of(int(i) * threads_per_cluster, threads_per_cluster);
  for (int i = 0; i < count; ++i) {
    Block& block = blocks_[i];
    block.meeting = meeting_of(i * threads_per_block_, threads_per_block_);
    block.cluster = &clusters_[i / grid_.cluster];
    block.index = first + i;
    block.shared = arena_.shared_of(i);
    agents_[i] = tsan::create();
  }
  for (size_t i = 0; i < warps_.size(); ++i) {
    warps_[i].meeting = meeting_of(int(i) * warp_size, warp_size);
    warps_[i].position = int(i);
    ready_.push_back(&warps_[i]);
  }
  for (int i = 0; i < threads; ++i) {
    Thread& thread = threads_[i];
    thread.block = &blocks_[i / threads_per_block_];
    thread.warp = &warps_[i / warp_size];
    thread.index = i % threads_per_block_;
    thread.shadow = tsan::create();
    thread.stack = {arena_.stack_of(i), arena_.stack_size()};
    thread.context.start(arena_.stack_of(i), arena_.stack_size(), enter);
  }
}

void Machine::tear_down() {
  for (Thread& thread : threads_) tsan::destroy(thread.shadow);
  for (void* agent : agents_) tsan::destroy(agent);
}

void Machine::enter() {
  Machine& m = *machine;
  const Stack from = after_switch();
  if (!m.launch_stack_.bottom) m.launch_stack_ = from;  // the first switch is from there
  char thrown[200] = "";
  try {
    m.entry_(m.current_->block->shared, m.arguments_);
  } catch (const std::exception& e) {
    std::snprintf(thrown, sizeof thrown, "%s", e.what());
  } catch (...) {
    std::snprintf(thrown, sizeof thrown, "not a std::exception");
  }
  if (thrown[0]) m.fail("the kernel threw: %s", thrown);
  m.exit_thread();
}

void Machine::exit_thread() {
  Thread& thread = self();
  thread.exited = true;
  progress();
  tsan::release(&all_exited_);
  check_exit(thread.warp->meeting, "warp");
  check_exit(thread.block->meeting, "block");
  if (grid_.cluster > 1) check_exit(*thread.block->cluster, "cluster");
  if (Thread* const other = next(true))
    switch_to(*other);
  else
    switch_to_launch();
  std::abort();
}

void Machine::check_exit(Meeting& meeting, const char* of) {
  ++meeting.exited;
  if (meeting.arrived != 0)
    fail("deadlock: thread %d of block %d exited, and others of its %s wait at %s for it",
         self().index, self().block->index, of, meeting.place->name.c_str());
}

std::string Machine::text_of_waits() const {
  std::map<std::string, int> counts;
  for (const Thread& thread : threads_)
    ++counts[thread.exited   ? "exited"
             : thread.waits ? "at " + thread.waits->name
                            : "running or not started"];
  std::string text;
  for (const auto& [where, count] : counts)
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + where;
  return text;
}

void Machine::fail(const char* format, ...) {
  {
    const tsan::Unseen unseen;
    std::va_list arguments;
    va_start(arguments, format);
    char what[600];
    std::vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    std::snprintf(failure_, sizeof failure_, "%s (threads: %s)", what, text_of_waits().c_str());
  }
  switch_to_launch();
  std::abort();
}

void Machine::switch_to(Thread& thread) {
  Thread* const from = current_;
  if (&thread == from) return;
  current_ = &thread;
  ++switches;
  tsan::switch_to(thread.shadow);
  before_switch(thread.stack);
  (from ? from->context : launch_).switch_to(thread.context);
  after_switch();
}

void Machine::switch_to_launch() {
  tsan::switch_to(launch_shadow_);
  before_switch(launch_stack_);
  current_->context.switch_to(launch_);
}

// Lets another thread run: one of the same warp, if `stay` and there is one, most of the time.
void Machine::reschedule(const Place* place, bool stay) {
  Thread& thread = self();
  thread.waits = place;
  switch_to(*next(stay));
  thread.waits = nullptr;
}

void Machine::sometimes_yield() {
  if (random() % 16 != 0) return;
  make_ready(self());
  reschedule(nullptr, false);
}

Thread* Machine::next(bool stay) {
  for (;;) {
    if (ready_.empty() && in_flight() != 0) {
      deliver_any();
      continue;
    }
    if (in_flight() != 0 && random() % delivery_interval_ == 0)
      for (uint64_t left = 1 + random() % in_flight(); left != 0; --left) deliver_any();
    if (!ready_.empty()) break;
    const auto exited = [](const Thread& thread) { return thread.exited; };
    if (std::all_of(threads_.begin(), threads_.end(), exited)) return nullptr;
    fail("deadlock");
  }
  const bool same = stay && last_warp_ && last_warp_->ready && random() % 64 != 0;
  Warp& warp = same ? *last_warp_ : choose_warp();
  last_warp_ = &warp;
  const int turn = int(random() % warp_size);
  const uint32_t turned = warp.ready >> turn | warp.ready << (-turn & 31);
  const int lane = (__builtin_ctz(turned) + turn) % warp_size;
  make_unready(warp, lane);
  return &warp.meeting.first[lane];
}

Warp& Machine::choose_warp() {
  if (adversarial_ && --whim_left_ <= 0) change_whims();
  if (adversarial_ && whim_ == Whim::favour_warp && warps_[victim_].ready) return warps_[victim_];
  Warp* warp = nullptr;
  for (int attempt = 0; attempt < 16; ++attempt) {
    warp = ready_[random() % ready_.size()];
    if (!adversarial_ || !starved(*warp)) break;
  }
  return *warp;
}

void Machine::change_whims() {
  constexpr int intervals[] = {2, 64, 2048};
  whim_ = Whim(random() % 3);
  whim_left_ = int(random() % (threads_.size() * 4));
  victim_ = int(random() % (whim_ == Whim::starve_block ? blocks_.size() : warps_.size()));
  delivery_interval_ = intervals[random() % 3];
}

bool Machine::starved(const Warp& warp) const {
  if (whim_ == Whim::starve_warp) return &warp == &warps_[victim_];
  return whim_ == Whim::starve_block && warp.meeting.first->block == &blocks_[victim_];
}

void Machine::make_ready(Warp& warp, uint32_t lanes) {
  if (!lanes) return;
  if (!warp.ready) {
    warp.position = int(ready_.size());
    ready_.push_back(&warp);  // within its capacity
  }
  warp.ready |= lanes;
}

void Machine::make_unready(Warp& warp, int lane) {
  warp.ready &= ~(1u << lane);
  if (warp.ready) return;
  ready_[warp.position] = ready_.back();
  ready_[warp.position]->position = warp.position;
  ready_.pop_back();
}

void Machine::join(Meeting& meeting, const char* of, const Place* place) {
  if (meeting.exited != 0)
    fail("deadlock: thread %d of block %d waits at %s for threads of its %s that have exited",
         self().index, self().block->index, place->name.c_str(), of);
  if (meeting.arrived != 0 && meeting.place != place)
    fail("threads of one %s, of block %d, meet at %s and at %s", of, self().block->index,
         meeting.place->name.c_str(), place->name.c_str());
  meeting.place = place;
  ++meeting.arrived;
}

void Machine::sync(Meeting& meeting, const char* of, const Place* place) {
  join(meeting, of, place);
  void* const token = meeting.token.of(meeting.round);
  tsan::release(token);
  if (meeting.arrived == meeting.members) {
    progress();
    meeting.arrived = 0;
    ++meeting.round;
    for (int i = 0; i < meeting.members; i += warp_size)
      make_ready(*meeting.first[i].warp, all_lanes);
  }
  reschedule(place, true);
  tsan::acquire(token);
}

// The parity of the round that all lanes have brought their words to.
int Machine::meet_in_warp(const Place* place, const uint32_t* words, int count) {
  Warp& warp = *self().warp;
  Meeting& meeting = warp.meeting;
  join(meeting, "warp", place);
  const int round = int(meeting.round & 1);
  std::copy_n(words, count, warp.words[round][self().lane()]);
  const bool orders = place->operation == Operation::warp_sync;
  if (orders) tsan::release(meeting.token.of(round));
  if (meeting.arrived == warp_size) {
    if (place->operation == Operation::multiply_add) multiply(warp, round);
    meeting.arrived = 0;
    ++meeting.round;
    make_ready(warp, all_lanes & ~(1u << self().lane()));
  } else {
    reschedule(place, true);
  }
  if (orders) tsan::acquire(meeting.token.of(round));
  return round;
}

// By the layout of mma.m16n8k16: a lane has a pair of columns (of rows of b) out of 8.
void Machine::multiply(Warp& warp, int round) {
  const auto& words = warp.words[round];
  const auto half = [is_float16 = words[0][6] != 0](uint32_t pair, int k) {
    const uint16_t bits = uint16_t(pair >> k % 2 * 16);
    return is_float16 ? from_float16(bits) : from_bfloat16(bits);
  };
  float b[16][8];
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < 8; ++j) b[k][j] = half(words[j * 4 + k % 8 / 2][4 + k / 8], k);
  for (int i = 0; i < 16; ++i) {
    float* const row = warp.product[round][i];
    std::fill_n(row, 8, 0.f);
    for (int k = 0; k < 16; ++k) {
      const float a = half(words[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2], k);
      for (int j = 0; j < 8; ++j) row[j] += a * b[k][j];
    }
  }
}

void Machine::deliver_any() {
  progress();
  const uint64_t which = random() % in_flight();
  if (which >= stores_.size()) return deliver_packet(int(which - stores_.size()));
  const AsyncStore store = stores_[which];
  stores_[which] = stores_.back();
  stores_.pop_back();
  deliver(store);
}

void Machine::deliver(const AsyncStore& store) {
  Block& block = *store.destination;
  if (block.meeting.exited == threads_per_block_)
    fail("a store_async of block %d arrives at block %d, which has exited",
         store.sender->block->index, block.index);
  tsan::switch_to(agents_[&block - blocks_.data()]);
  tsan::acquire(&store.sender->sent);
  tsan::write(store.p, store.count * sizeof(uint32_t));
  tsan::read(store.barrier, sizeof(Mbarrier));
  MbarrierState& state = state_of(store.barrier, block, "the arrival of a store_async");
  if (!state.fenced)
    fail("a store_async arrives at block %d before an mbarrier_init_fence after mbarrier_init",
         block.index);
  for (int i = 0; i < store.count; ++i)
    static_cast<volatile uint32_t*>(store.p)[i] = store.words[i];
  state.bytes -= store.count * int(sizeof(uint32_t));
  tsan::release(state.token.of(state.phase));
  tsan::switch_to(current_->shadow);
  complete_if_done(state);
}

void Machine::deliver_packet(int position) {
  const tsan::Unseen unseen;
  const Packet packet = packets_.remove(position);
  --packet.sender->packets_in_flight;
  tsan::switch_to(packet_agent_);
  tsan::acquire(&packet.sender->sent);
  for (int i = 0; i < packet.value.halves; ++i)
    tsan::store_relaxed(packet.p + i, packet.value.half[i]);
  tsan::release(&all_exited_);
  tsan::switch_to(current_->shadow);
}

void Machine::store_packet(uint64_t* p, const PacketValue& value) {
  progress();
  tsan::release(&self().sent);
  {
    const tsan::Unseen unseen;
    packets_.add(&self(), p, value);
  }
  ++self().packets_in_flight;
  sometimes_yield();
}

void Machine::await_packet(const uint64_t* p, const Place* place) {
  // A round of loads by all threads is nothing unusual, a thousand rounds are.
  const int64_t most_idle_loads = 1000000 + 1000 * int64_t(threads_.size());
  if (++idle_loads_ > most_idle_loads && in_flight() == 0) {
    self().waits = place;
    fail("livelock: threads load packets, and nothing else happens");
  }
  while (self().packets_in_flight != 0) {  // a thread sees its own stores
    const int position = packets_.position_of(&self(), p);
    if (position == none) break;
    deliver_packet(position);
  }
  make_ready(self());
  reschedule(place, false);
}

// Of p in the shared memory of the running thread's block, where all `size` bytes have to be.
int Machine::offset_of(const void* p, size_t size, const char* what, const Place* place) {
  const ptrdiff_t offset = static_cast<const char*>(p) - self().block->shared;
  if (offset < 0 || size_t(offset) + size > grid_.shared_bytes)
    fail("%s: the %s is not within the shared memory (thread %d of block %d)",
         place->name.c_str(), what, self().index, self().block->index);
  if (offset % ptrdiff_t(size) != 0)
    fail("%s: the %s, at byte %td of shared memory, is not aligned", place->name.c_str(), what,
         offset);
  return int(offset);
}

// An mbarrier's own 8 bytes hold this mark and the number of its state.
constexpr uint64_t mark = uint64_t(0x6d626172) << 32;

MbarrierState& Machine::state_of(Mbarrier* barrier, const Block& block, const char* what) {
  const uint64_t content = *static_cast<volatile Mbarrier*>(barrier);
  const uint64_t number = content ^ mark;
  if (number < mbarriers_.size() && mbarriers_[number].address == barrier)
    return mbarriers_[number];
  const auto same = [&](const MbarrierState& state) { return state.address == barrier; };
  const bool known = std::any_of(mbarriers_.begin(), mbarriers_.end(), same);
  fail("%s: the mbarrier at byte %td of the shared memory of block %d %s", what,
       reinterpret_cast<char*>(barrier) - block.shared, block.index,
       known ? "has been overwritten" : "is not initialised");
}

void Machine::init(Mbarrier* barrier, int arrivals, const Place* place) {
  const tsan::Unseen unseen;
  const int offset = offset_of(barrier, sizeof *barrier, "mbarrier", place);
  for (const MbarrierState& state : mbarriers_)
    if (state.address == barrier)
      fail("%s: the mbarrier at byte %d of shared memory is initialised again",
           place->name.c_str(), offset);
  if (arrivals <= 0) fail("%s: a count of %d", place->name.c_str(), arrivals);
  *static_cast<volatile Mbarrier*>(barrier) = mark ^ mbarriers_.size();
  mbarriers_.push_back({barrier, self().block, &self(), arrivals, arrivals});
}

void Machine::fence_inits() {
  for (MbarrierState& state : mbarriers_)
    if (state.initialiser == &self()) state.fenced = true;
}

void Machine::expect(Mbarrier* barrier, int bytes, const Place* place) {
  offset_of(barrier, sizeof *barrier, "mbarrier", place);
  sometimes_yield();
  MbarrierState& state = state_of(barrier, *self().block, place->name.c_str());
  tsan::read(barrier, sizeof *barrier);
  tsan::release(state.token.of(state.phase));
  if (state.pending == 0)
    fail("%s: an arrival beyond the %d of the mbarrier (thread %d of block %d)",
         place->name.c_str(), state.count, self().index, self().block->index);
  --state.pending;
  state.bytes += bytes;
  progress();
  complete_if_done(state);
}

void Machine::complete_if_done(MbarrierState& state) {
  constexpr int64_t most_bytes = (1 << 20) - 1;
  if (std::abs(state.bytes) > most_bytes)
    fail("%td bytes at once are more than an mbarrier of block %d can count",
         ptrdiff_t(std::abs(state.bytes)), state.block->index);
  if (state.pending != 0 || state.bytes != 0) return;
  ++state.phase;
  state.pending = state.count;
  while (Thread* const thread = state.waiting) {
    state.waiting = thread->next_waiting;
    make_ready(*thread);
  }
}

void Machine::wait(Mbarrier* barrier, uint32_t parity, const Place* place) {
  tsan::read(barrier, sizeof *barrier);
  sometimes_yield();
  if (parity > 1) fail("%s: a parity of %u", place->name.c_str(), parity);
  for (;;) {
    MbarrierState& state = state_of(barrier, *self().block, place->name.c_str());
    if ((state.phase & 1) != parity) {
      tsan::acquire(state.token.of(parity));
      break;
    }
    self().next_waiting = state.waiting;
    state.waiting = &self();
    reschedule(place, true);
  }
  progress();
}

void Machine::store_async(uint32_t* p, int rank, const uint32_t* words, int count,
                          Mbarrier* barrier, const Place* place) {
  if (rank < 0 || rank >= grid_.cluster)
    fail("%s: no block of rank %d in a cluster of %d", place->name.c_str(), rank, grid_.cluster);
  const int offset = offset_of(p, count * sizeof *p, "destination", place);
  const int barrier_offset = offset_of(barrier, sizeof *barrier, "mbarrier", place);
  const int here = int(self().block - blocks_.data());
  Block& twin = blocks_[here / grid_.cluster * grid_.cluster + rank];
  AsyncStore store = {&self(),
                      &twin,
                      reinterpret_cast<uint32_t*>(twin.shared + offset),
                      reinterpret_cast<Mbarrier*>(twin.shared + barrier_offset),
                      {},
                      count};
  std::copy_n(words, count, store.words);
  tsan::release(&self().sent);
  progress();
  {
    const tsan::Unseen unseen;
    stores_.push_back(store);
  }
  sometimes_yield();
}

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

// Sets a variable while it lives.
struct Running {
  explicit Running(Machine& running) { machine = &running; }
  ~Running() { machine = nullptr; }
};

}  // namespace

namespace detail {

void run(const Grid& grid, int threads, Entry entry, const void* arguments) {
  static std::mutex mutex;
  static Arena arena;
  const std::lock_guard<std::mutex> lock(mutex);
  check(grid, threads);
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

std::vector<std::string> sites() { return places.names(); }
void clear_sites() { places.clear(); }
uint64_t thread_switches() { return switches; }

int thread_index() { return machine->self().index; }
int block_index() { return machine->self().block->index; }
int block_count() { return machine->grid().blocks; }

void block_sync(Site site) {
  const Place* const place = places.find(site, Operation::block_sync);
  if (place->fault == Fault::none) machine->sync(machine->self().block->meeting, "block", place);
}

void cluster_sync(Site site) {
  const Place* const place = places.find(site, Operation::cluster_sync);
  if (place->fault == Fault::none)
    machine->sync(*machine->self().block->cluster, "cluster", place);
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
  machine->store_packet(
      reinterpret_cast<uint64_t*>(p),
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
