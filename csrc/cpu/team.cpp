#include "team.h"

#include <algorithm>
#include <atomic>
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

struct TeamState {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
};

namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<int> processors_of_test{0};

}  // namespace

void Member::wait() {
  const int round = state_->round.load(std::memory_order_relaxed);
  if (state_->arrived.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    state_->arrived.store(0, std::memory_order_relaxed);
    state_->round.store(round + 1, std::memory_order_release);
    return;
  }
  // A member that has lost its processor cannot arrive: ours is given up after a few microseconds.
  for (int spins = 0; state_->round.load(std::memory_order_acquire) == round; spins++) {
    if (spins < 2000)
      pause();
    else
      std::this_thread::yield();
  }
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

void run_team(int threads, void (*body)(Member&, void*), void* context) {
  TeamState state;
#ifdef MMIXER_OPENMP
  if (threads > 1 && !omp_in_parallel()) {
    auto run = [&] {
      Member member(omp_get_thread_num(), omp_get_num_threads(), &state);
      body(member, context);
    };
    GOMP_parallel([](void* call) { (*static_cast<decltype(run)*>(call))(); }, &run, threads, 0);
    return;
  }
  threads = 1;
#endif
  const auto run = [&](int index) {
    Member member(index, threads, &state);
    body(member, context);
  };
  std::vector<std::thread> others;
  for (int index = 1; index < threads; index++) others.emplace_back(run, index);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace mmixer::cpu
