#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>

namespace mmixer::cuda::emulator {

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
  // An acquire between the blocks would order them.
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
  // New memory, so that ThreadSanitizer does not know the tokens of the blocks before.
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
    ++counts[thread.exited  ? "exited"
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

// Lets another thread run: with `stay` most of the time one of the same warp, if one is ready.
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

// The layout is that of mma.m16n8k16: a lane has a pair of columns (of rows of b) out of 8.
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

int Machine::offset_of(const void* p, size_t size, const char* what, const Place* place) {
  const ptrdiff_t offset = static_cast<const char*>(p) - self().block->shared;
  if (offset < 0 || size_t(offset) + size > grid_.shared_bytes)
    fail("%s: the %s is not within the shared memory (thread %d of block %d)", place->name.c_str(),
         what, self().index, self().block->index);
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
      fail("%s: the mbarrier at byte %d of shared memory is initialised again", place->name.c_str(),
           offset);
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

}  // namespace mmixer::cuda::emulator
