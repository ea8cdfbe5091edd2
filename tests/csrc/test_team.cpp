// Teams meet: no member leaves a barrier before all have come, none sleeps for ever, and what is
// written before is visible after. On one processor they have to sleep, and then become fewer.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "../../csrc/cpu/team.h"

using namespace mmixer::cpu;

namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

// Ends the program where a wake-up is lost: a hang says nothing.
struct Watch {
  std::atomic<bool> done{false};
  std::thread thread{[this] {
    for (int i = 0; i < 6000 && !done; i++)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    expect(done, "a team has ended within a minute");
  }};
  ~Watch() {
    done = true;
    thread.join();
  }
};

// Members that are late at random: not at all, less than a waiting one spins, about as long, and
// longer. Values are not atomic: the barriers alone order them.
void meet(int members, int rounds) {
  std::vector<int> values(members, -1);
  auto body = [&](Member& member) {
    expect(member.size() == members, "a team has all its members");
    std::minstd_rand random(1 + member.index());
    for (int round = 0; round < rounds; round++) {
      const int late = int(random() % 32);
      if (late < 4)
        std::this_thread::sleep_for(std::chrono::microseconds(late * 50));
      else if (late == 4)
        std::this_thread::yield();
      values[member.index()] = round;
      member.barrier();
      for (const int value : values) expect(value == round, "each member has come");
      member.barrier();
    }
  };
  run_team(members, body);
}

// Two members, of which one is late by about as long as the other spins before it sleeps, for some
// seconds: the last member ends the round while the other goes to sleep.
void meet_at_the_brink_of_sleep(std::chrono::seconds duration) {
  using Clock = std::chrono::steady_clock;
  std::minstd_rand seeds(1);
  for (const auto end = Clock::now() + duration; Clock::now() < end;) {
    const auto seed = seeds();
    auto body = [&](Member& member) {
      std::minstd_rand random(seed);
      for (int round = 0; round < 1000; round++) {
        const auto late = std::chrono::nanoseconds(95000 + random() % 30000);
        const auto comes = Clock::now() + late;
        while (round % 2 == member.index() && Clock::now() < comes) continue;
        member.barrier();
      }
    };
    run_team(2, body);
  }
}

int size_of_a_team(int threads) {
  int size = 0;
  auto body = [&](Member& member) {
    if (member.index() == 0) size = member.size();
    for (int i = 0; i < 3; i++) member.barrier();
  };
  run_team(threads, body);
  return size;
}

}  // namespace

int main() {
  const Watch watch;
  set_available_processors(4);  // teams keep their size
  constexpr int64_t worth = multiplications_per_member;
  expect(team_size(2 * worth - 1, 8) == 1, "one member has what is not worth two");
  expect(team_size(2 * worth, 8) == 2, "two have what is worth two");
  expect(team_size(9 * worth, 3) == 3, "a team has no more members than there may be threads");
  expect(team_size(9 * worth, 8) == 4 && worthy_threads(9 * worth, 8) == 8,
         "a team has no more members than there are processors");
  expect(team_size(0, 8) == 1, "a call without work has a member");
  for (const int members : {1, 2, 3, 4, 7}) meet(members, 2000);
  meet_at_the_brink_of_sleep(std::chrono::seconds(5));
#ifdef __linux__
  cpu_set_t before, one;
  sched_getaffinity(0, sizeof before, &before);
  CPU_ZERO(&one);
  for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++)
    if (CPU_ISSET(i, &before)) CPU_SET(i, &one);
  std::thread([&] {  // its pool's threads inherit the one processor
    sched_setaffinity(0, sizeof one, &one);
    meet(3, 2000);
    expect(size_of_a_team(3) == 3, "a test's teams keep their size");
    set_available_processors(0);
    expect(size_of_a_team(3) == 3, "the first team has its size");
    expect(size_of_a_team(3) == 1, "the next has the processors of one that was crowded");
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    expect(size_of_a_team(3) == 3, "a crowd is forgotten");
  })
      .join();
#endif
  std::printf("teams of 1 to 7 members met\n");
}
