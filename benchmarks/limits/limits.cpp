// Compiled once per instruction set, as csrc/cpu/instruction_set.cpp is.
#include "limits.h"

#include <atomic>
#include <chrono>

#include "../../csrc/cpu/forward.h"
#include "loops.h"

namespace mmixer::cpu::MMIXER_ISA {
namespace {

int64_t multiply_add_team(int64_t rounds, int threads) {
  std::atomic<int64_t> operations{0};
  auto body = [&](Member&) { operations += multiply_add(rounds); };
  run_team(threads, body);
  return operations;
}

void read_team(const float* memory, int64_t size, int64_t rounds, int threads) {
  auto body = [&](Member& member) {
    const int64_t first = member.begin(size);
    read(memory + first, member.end(size) - first, rounds);
  };
  run_team(threads, body);
}

double recurrence_seconds(const Problem& p, const Results& results, float* workspace) {
  using Clock = std::chrono::steady_clock;
  const Schedule schedule(p.steps, p.batch, p.lengths);
  const Saved<float> saved(nullptr, p);
  const ForwardBuffers<float> buffers(Arena<float>(workspace), p, saved);
  double seconds = 0;
  auto body = [&](Member& member) {
    forward_begin(member, p, schedule, buffers);
    const auto start = Clock::now();
    forward_steps(member, p, schedule, buffers, saved, results);
    if (member.index() == 0) seconds = std::chrono::duration<double>(Clock::now() - start).count();
  };
  run_team(team_size(p), body);
  return seconds;
}

}  // namespace

const Limits limits{multiply_add_team, read_team, recurrence_seconds};

}  // namespace mmixer::cpu::MMIXER_ISA
