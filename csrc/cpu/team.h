// A team of threads that runs one function and meets at barriers.
#pragma once

#include <cstdint>

namespace mmixer::cpu {

struct TeamState;

// One thread's view of its team.
class Member {
 public:
  Member(int index, int size, TeamState* state) : index_(index), size_(size), state_(state) {}

  // Waits for all members; what they wrote before is visible after.
  void barrier() {
    if (size_ > 1) wait();
  }

  int index() const { return index_; }
  int size() const { return size_; }

  // This member's share of `count` items, in order and without gaps.
  int64_t begin(int64_t count) const { return count * index_ / size_; }
  int64_t end(int64_t count) const { return count * (index_ + 1) / size_; }

 private:
  void wait();

  int index_, size_;
  TeamState* state_;
};

// Runs body on `threads` threads of the OpenMP pool that torch uses too (libgomp, one per process);
// on fewer inside a parallel region, where the pool gives none, and for a tenth of a second after a
// team whose members had to share processors. A build without OpenMP runs it on threads of the
// call's own.
void run_team(int threads, void (*body)(Member&, void*), void* context);

// The fewest multiplications of a step's product that are worth a member's barriers.
constexpr int64_t multiplications_per_member = 32768;

// How many of the threads are worth their barriers where a step's product has that many
// multiplications, and how many of those have a processor.
int worthy_threads(int64_t multiplications, int threads);
int team_size(int64_t multiplications, int threads);

// The processors that this process may use, or the number that a test has set; 0 sets it back.
int available_processors();
void set_available_processors(int count);

template <class Body>
void run_team(int threads, Body& body) {
  run_team(
      threads, [](Member& member, void* context) { (*static_cast<Body*>(context))(member); },
      &body);
}

}  // namespace mmixer::cpu
