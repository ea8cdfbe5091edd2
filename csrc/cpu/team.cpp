// How the members of a team meet.
//
// On an idle machine the others come within microseconds, and sleeping would take tens of them: a
// member that waits spins. On a busy one, a member whose processor has gone to another process
// stays away for a slice of the scheduler's, which is milliseconds. Who spins then, or yields, uses
// up its own slice too and is away when the other comes, so that each meeting takes a slice; who
// sleeps keeps what the scheduler owes it and has its processor back soon after it is woken.
// Therefore a member sleeps once it has waited for `patience`, and at once where another member has
// its processor: that one comes when this one leaves. The member that comes last wakes them.
//
// Members that share a processor, as where another process has one of two, finish later than one
// member would: the pool's own threads spin for milliseconds at both ends of a team's run. For
// `respite` after, teams have as many members as that one had processors.
#include "team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#ifdef MMIXER_OPENMP
// What GCC makes of `#pragma omp parallel`, called by name: Clang's code for the pragma would bring
// libomp, whose threads would wait beside those of torch's libgomp.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags);
int omp_in_parallel();
int omp_get_thread_num();
int omp_get_num_threads();
}
#endif

namespace mmixer::cpu {

using Clock = std::chrono::steady_clock;

namespace {

// Many times what waking takes, so that an idle machine's members hardly ever sleep, and a small
// part of a slice.
constexpr std::chrono::microseconds patience{100};
constexpr std::chrono::milliseconds respite{100};

// A cache line for each member, which it writes after each meeting.
struct alignas(64) Seat {
  std::atomic<int> processor{-1};  // where it last began to work
};

}  // namespace

struct TeamState {
  explicit TeamState(int size) : seats(size) {}

  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};  // the number of meetings that have ended
  std::atomic<int> sleepers{0};
  std::atomic<bool> has_slept{false};
  std::mutex mutex;
  std::condition_variable round_ended;
  std::vector<Seat> seats;
};

namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The number of the processor that the caller runs on; -1 where the system does not tell.
inline int this_processor() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// Whether the round has ended while it was worth spinning for.
bool spin(const TeamState& team, int round, int index) {
  const auto ends_soon = [&] {
    for (int i = 0; i < 64; i++) {
      if (team.round.load(std::memory_order_acquire) != round) return true;
      pause();
    }
    return false;
  };
  if (ends_soon()) return true;
  const int processor = this_processor();
  const Clock::time_point end = Clock::now() + patience;
  do {
    for (int i = 0; i < int(team.seats.size()); i++)
      if (i != index && processor >= 0 &&
          team.seats[i].processor.load(std::memory_order_relaxed) == processor)
        return false;
    if (ends_soon()) return true;
  } while (Clock::now() < end);
  return false;
}

// Sleeps until the round has ended. No call is lost: the sleeper counts itself before it looks at
// the round, and the last member ends the round before it looks at the count, so that one of them
// sees the other; and who is seen holds the mutex from that look until it sleeps. Both change what
// they write by an atomic exchange or addition: a store would do for C++ and for processors, but
// qemu-user lets a load overtake an emulated store of AArch64, and both would miss each other.
void sleep(TeamState& team, int round) {
  team.has_slept.store(true, std::memory_order_relaxed);
  std::unique_lock<std::mutex> lock(team.mutex);
  team.sleepers++;
  team.round_ended.wait(lock, [&] { return team.round.load() != round; });
  team.sleepers--;
}

void end_round(TeamState& team, int round) {
  team.arrived.store(0, std::memory_order_relaxed);
  team.round.exchange(round + 1);
  if (team.sleepers.load() == 0) return;
  team.mutex.lock();
  team.mutex.unlock();
  team.round_ended.notify_all();
}

std::atomic<int> processors_of_test{0};

// A crowded team's number of processors, and until when it holds for other teams.
std::atomic<int> crowded_processors{0};
std::atomic<Clock::rep> crowded_until{0};

int without_crowd(int threads) {
  if (threads == 1 || processors_of_test) return threads;
  if (Clock::now().time_since_epoch().count() >= crowded_until) return threads;
  return std::min<int>(threads, crowded_processors);
}

void look_for_crowd(const TeamState& team) {
  if (!team.has_slept || processors_of_test) return;
  std::vector<int> processors;
  for (const Seat& seat : team.seats)
    if (seat.processor >= 0) processors.push_back(seat.processor);
  const size_t members = processors.size();
  std::sort(processors.begin(), processors.end());
  processors.erase(std::unique(processors.begin(), processors.end()), processors.end());
  if (processors.size() == members) return;
  crowded_processors = int(processors.size());
  crowded_until = (Clock::now() + respite).time_since_epoch().count();
}

}  // namespace

void Member::wait() {
  TeamState& team = *state_;
  const int round = team.round.load(std::memory_order_relaxed);
  if (team.arrived.fetch_add(1, std::memory_order_acq_rel) == size_ - 1)
    end_round(team, round);
  else if (!spin(team, round, index_))
    sleep(team, round);
  team.seats[index_].processor.store(this_processor(), std::memory_order_relaxed);
}

int available_processors() {
  if (const int count = processors_of_test) return count;
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

void set_available_processors(int count) { processors_of_test = count; }

int worthy_threads(int64_t multiplications, int threads) {
  const int64_t worth = multiplications / multiplications_per_member;
  return int(std::max<int64_t>(1, std::min<int64_t>(worth, threads)));
}

int team_size(int64_t multiplications, int threads) {
  const int worth = worthy_threads(multiplications, threads);
  return worth == 1 ? 1 : std::min(worth, available_processors());
}

void run_team(int threads, void (*body)(Member&, void*), void* context) {
#ifdef MMIXER_OPENMP
  if (omp_in_parallel()) threads = 1;
#endif
  threads = without_crowd(threads);
  if (threads == 1) {
    Member alone(0, 1, nullptr);
    return body(alone, context);
  }
  TeamState team(threads);
  const auto run = [&](int index, int size) {
    team.seats[index].processor.store(this_processor(), std::memory_order_relaxed);
    Member member(index, size, &team);
    body(member, context);
  };
#ifdef MMIXER_OPENMP
  auto pooled = [&] { run(omp_get_thread_num(), omp_get_num_threads()); };
  GOMP_parallel([](void* call) { (*static_cast<decltype(pooled)*>(call))(); }, &pooled, threads, 0);
#else
  std::vector<std::thread> others;
  for (int index = 1; index < threads; index++) others.emplace_back(run, index, threads);
  run(0, threads);
  for (std::thread& other : others) other.join();
#endif
  look_for_crowd(team);
}

}  // namespace mmixer::cpu
