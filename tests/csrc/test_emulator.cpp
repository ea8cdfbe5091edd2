// Tests of the emulator (csrc/emulator): its functions do what the device's do, and it, or the
// result, shows what is wrong with a kernel.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

using namespace mmixer::cuda;

namespace {

using Schedule = Options::Schedule;

int failures = 0, checks = 0;

void check(bool ok, const std::string& what) {
  ++checks;
  if (!ok && ++failures <= 30) std::printf("FAILED: %s\n", what.c_str());
}

// The message of the error that `run` throws, empty where it throws none.
std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void check_error(const std::function<void()>& run, const std::string& part) {
  const std::string error = error_of(run);
  check(contains(error, part), "an error about '" + part + "', not '" + error + "'");
}

void with_schedules(int seeds, const std::function<void()>& run) {
  for (const Schedule schedule : {Schedule::random, Schedule::adversarial})
    for (int seed = 1; seed <= seeds; ++seed) {
      options().schedule = schedule;
      options().seed = seed;
      run();
    }
  options() = Options();
}

constexpr Grid one_block = {1, 1, false, 0, nullptr};

Grid grid_of(int blocks, int cluster, size_t shared_bytes) {
  return {blocks, cluster, false, shared_bytes, nullptr};
}

// A kernel that calls a function, so that a test can be one lambda.
template <int count>
struct Body {
  struct Arguments {
    std::function<void(void*)> body;
  };
  static constexpr int threads = count;
  static void run(void* shared, const Arguments& arguments) { arguments.body(shared); }
};

template <int threads = 64>
void launch_body(const Grid& grid, const std::function<void(void*)>& body) {
  launch<Body<threads>>(grid, {body});
}

void test_indices() {
  std::vector<int> seen(3 * 64);
  launch_body(grid_of(3, 1, 0), [&](void*) { ++seen[block_index() * 64 + thread_index()]; });
  check(std::count(seen.begin(), seen.end(), 1) == 3 * 64, "every thread of every block runs once");
}

void test_shuffles() {
  with_schedules(5, [] {
    std::vector<double> sums(128), neighbours(128);
    launch_body<128>(one_block, [&](void*) {
      const int t = thread_index();
      float sum = float(t);
      for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
      sums[t] = sum;
      neighbours[t] = shuffle_xor(1e300 * t, 1);
    });
    for (int t = 0; t < 128; ++t) {
      check(sums[t] == 32 * (t / 32 * 32) + 31 * 16, "sum of a warp by shuffles");
      check(neighbours[t] == 1e300 * (t ^ 1), "shuffle of doubles");
    }
  });
}

template <bool half>
void test_multiply_add() {
  float a[16][16], b[16][8], c[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = float((i * 7 + k * 5) % 13 - 6);
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < 8; ++j) b[k][j] = float((k * 3 + j * 11) % 17 - 8);
  const auto pair = [](float low, float high) {
    const auto bits = half ? to_float16 : to_bfloat16;
    return uint32_t(bits(high)) << 16 | bits(low);
  };
  launch_body<32>(one_block, [&](void*) {
    const int row = thread_index() / 4, two = thread_index() % 4 * 2;
    const auto of_a = [&](int i, int k) { return pair(a[i][k], a[i][k + 1]); };
    const auto of_b = [&](int k) { return pair(b[k][row], b[k + 1][row]); };
    const Word4 fragment = {
        {of_a(row, two), of_a(row + 8, two), of_a(row, two + 8), of_a(row + 8, two + 8)}};
    float sums[4] = {1, 2, 3, 4};
    multiply_add<half>(sums, fragment, of_b(two), of_b(two + 8));
    for (int i = 0; i < 4; ++i) c[row + i / 2 * 8][two + i % 2] = sums[i];
  });
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float expected = float(1 + i / 8 * 2 + j % 2);
      for (int k = 0; k < 16; ++k) expected += a[i][k] * b[k][j];
      check(c[i][j] == expected, "multiply_add");
    }
}

// The value of a pattern by the format's definition.
double float16_value(int pattern) {
  const int exponent = pattern >> 10 & 31, fraction = pattern & 1023;
  const double size = exponent == 0    ? std::ldexp(fraction, -24)
                      : exponent == 31 ? (fraction ? NAN : INFINITY)
                                       : std::ldexp(1024 + fraction, exponent - 25);
  return pattern & 0x8000 ? -size : size;
}

double bfloat16_value(int pattern) {
  const int exponent = pattern >> 7 & 255, fraction = pattern & 127;
  const double size = exponent == 0     ? std::ldexp(fraction, -133)
                      : exponent == 255 ? (fraction ? NAN : INFINITY)
                                        : std::ldexp(128 + fraction, exponent - 134);
  return pattern & 0x8000 ? -size : size;
}

void test_conversion(const char* name, double value(int), float from(uint16_t), uint16_t to(float),
                     int infinity) {
  const std::string what = std::string(name) + " ";
  for (int sign : {0, 0x8000})
    for (int low = 0; low < 0x8000; ++low) {
      const int pattern = sign | low;
      const float x = from(uint16_t(pattern));
      if (low > infinity) {
        check(std::isnan(x) && std::isnan(from(to(x))), what + "NaN");
        continue;
      }
      check(x == value(pattern) && std::signbit(x) == (sign != 0), what + "to float32");
      check(to(x) == pattern, what + "there and back");
      if (low == infinity) continue;
      // Half way to the next (the overflow's next is 2^16 or 2^128) rounds to the even one, and
      // beside it to the nearer one.
      const double step = low ? value(low) - value(low - 1) : 0;
      const double size = value(low), next = low + 1 < infinity ? value(low + 1) : size + step;
      const float middle = float((size + next) / 2);
      const float s = sign ? -1.f : 1.f;
      check(to(s * middle) == pattern + low % 2, what + "half way");
      check(to(s * std::nextafter(middle, 0.f)) == pattern, what + "below half way");
      check(to(s * std::nextafter(middle, INFINITY)) == pattern + 1, what + "above half way");
    }
}

void test_conversions() {
  test_conversion("float16", float16_value, from_float16, to_float16, 0x7c00);
  test_conversion("bfloat16", bfloat16_value, from_bfloat16, to_bfloat16, 0x7f80);
  check(to_float16(1e30f) == 0x7c00 && to_float16(-1e30f) == 0xfc00, "float16 overflow");
  check(to_float16(1e-30f) == 0, "float16 underflow");
  check(std::isnan(from_float16(to_float16(-NAN))), "float16 of -NaN");
  check(std::isnan(from_bfloat16(to_bfloat16(-NAN))), "bfloat16 of -NaN");
}

// In each round every thread sends a number to all blocks of its cluster, and adds those that came.
// There are two buffers, so that none is written before all have read it. Within a block threads
// exchange numbers too, by block_sync and by warp_sync.
struct Exchange {
  static constexpr int threads = 64, cluster = 4, rounds = 6;

  struct Shared {
    alignas(16) Word4 came[2][cluster][threads];
    float single[2][cluster];
    float local[threads];
    Mbarrier barrier[2];
  };

  struct Arguments {
    float* sums;
  };

  static void run(void* memory, const Arguments& arguments) {
    Shared& shared = *static_cast<Shared*>(memory);
    const int t = thread_index(), rank = block_index() % cluster;
    constexpr int bytes = cluster * (threads * sizeof(Word4) + sizeof(float));
    if (t == 0) {
      for (Mbarrier& barrier : shared.barrier) mbarrier_init(&barrier, 1);
      mbarrier_init_fence();
    }
    cluster_sync();
    float x = float(block_index() * threads + t);
    for (int round = 0; round < rounds; ++round) {
      const int slot = round % 2;
      Mbarrier* const barrier = &shared.barrier[slot];
      if (t == 0) mbarrier_expect(barrier, bytes);
      for (int to = 0; to < cluster; ++to) {
        store_async(&shared.came[slot][rank][t], to, {{as_bits(x), 0, 0, as_bits(x + 1)}}, barrier);
        if (t == 0) store_async(&shared.single[slot][rank], to, x, barrier);
      }
      mbarrier_wait(barrier, round / 2 % 2);
      x = 0;
      for (int from = 0; from < cluster; ++from) {
        const Word4 word = shared.came[slot][from][(t + 7) % threads];
        x += as_float(word.word[0]) + as_float(word.word[3]) + shared.single[slot][from];
      }
      shared.local[t] = x;
      block_sync();
      x = std::fmod(x + shared.local[(t + 32) % threads], 1021.f);
      block_sync();
      shared.local[t] = x;
      warp_sync();
      x += shared.local[t ^ 5];
    }
    arguments.sums[block_index() * threads + t] = x;
  }

  static std::vector<float> expected(int clusters) {
    std::vector<float> result;
    for (int c = 0; c < clusters; ++c) {
      std::vector<float> x(cluster * threads), y(threads);
      for (size_t i = 0; i < x.size(); ++i) x[i] = float(c * cluster * threads + int(i));
      for (int round = 0; round < rounds; ++round) {
        for (int t = 0; t < threads; ++t) {
          y[t] = 0;
          for (int from = 0; from < cluster; ++from)
            y[t] += 2 * x[from * threads + (t + 7) % threads] + 1 + x[from * threads];
        }
        std::vector<float> z(threads);
        for (int t = 0; t < threads; ++t) z[t] = std::fmod(y[t] + y[(t + 32) % threads], 1021.f);
        for (size_t i = 0; i < x.size(); ++i) x[i] = z[i % threads] + z[i % threads ^ 5];
      }
      result.insert(result.end(), x.begin(), x.end());
    }
    return result;
  }

  // Whether a launch gives an error or something wrong.
  static bool fails(int clusters = 2, std::string* error = nullptr) {
    std::vector<float> sums(clusters * cluster * threads, NAN);
    const Grid grid = grid_of(clusters * cluster, cluster, sizeof(Shared));
    const std::string what = error_of([&] { launch<Exchange>(grid, {sums.data()}); });
    if (error) *error = what;
    return !what.empty() || sums != expected(clusters);
  }
};

void test_exchange() {
  with_schedules(20, [] {
    std::string error;
    check(!Exchange::fails(2, &error), "the exchange of a cluster: " + error);
  });
}

bool noticed(const Fault& fault) {
  int seeds = 0;
  with_schedules(10, [&] {
    options().fault = fault;
    seeds += Exchange::fails();
  });
  return seeds != 0;
}

void test_faults_of_exchange() {
  clear_sites();
  Exchange::fails();
  const std::vector<std::string> names = sites();
  check(names.size() == 6, "a cluster_sync, 2 block_sync, a warp_sync, an mbarrier_wait of 2");
  for (const std::string& site : names) {
    check(contains(site, "test_emulator.cpp:"), "the file in " + site);
    check(noticed({Fault::skip, site}), "notices that it lacks " + site);
    if (contains(site, "mbarrier_wait"))
      check(noticed({Fault::flip_parity, site}), "notices the wrong parity at " + site);
    else
      check(!noticed({Fault::flip_parity, site}), "flips the parity of mbarriers only");
  }
  check(!noticed({Fault::skip, "no such site"}), "a fault at no site has no effect");
  check(!Exchange::fails(), "works again after errors");
}

// Blocks in a ring: each passes on what it gets, and adds one. A block is ahead of the next by less
// than a turn of the ring, which is thus the number of slots.
struct Ring {
  static constexpr int threads = 32, rounds = 5, blocks = 3;

  struct Arguments {
    uint64_t* packets;  // [slots][blocks][threads]
    uint32_t* results;
    bool last_is_missing;
  };

  static void run(void*, const Arguments& arguments) {
    const int t = thread_index(), here = block_index(), next = (here + 1) % blocks;
    uint32_t value = 1000 * here + t;
    for (uint32_t round = 1; round <= rounds; ++round) {
      uint64_t* const slot = arguments.packets + round % blocks * blocks * threads;
      const bool missing = arguments.last_is_missing && round == rounds && here == 1;
      if (!missing) store_packet(&slot[next * threads + t], value, round);
      uint64_t packet = 0;
      while (!packet_ready(packet, round)) packet = load_packet(&slot[here * threads + t]);
      value = uint32_t(packet) + 1;
    }
    arguments.results[here * threads + t] = value;
  }
};

bool ring_fails(bool last_is_missing, std::string* error) {
  constexpr int blocks = Ring::blocks;
  std::vector<uint64_t> packets(blocks * blocks * Ring::threads, ~uint64_t(0));
  std::vector<uint32_t> results(blocks * Ring::threads);
  clear(packets.data(), packets.size() * sizeof(uint64_t), nullptr);
  *error = error_of([&] {
    launch<Ring>({blocks, 1, true, 0, nullptr}, {packets.data(), results.data(), last_is_missing});
  });
  bool right = error->empty();
  for (int i = 0; i < int(results.size()); ++i) {
    const int from = (i / Ring::threads + blocks * Ring::rounds - Ring::rounds) % blocks;
    right = right && results[i] == uint32_t(1000 * from + i % Ring::threads + Ring::rounds);
  }
  return !right;
}

void test_packets() {
  std::string error;
  clear_sites();
  with_schedules(10, [&] {
    std::vector<uint64_t> packets(64);
    launch_body(one_block, [&](void*) {
      const int t = thread_index();
      for (uint32_t i = 1; i <= 9; ++i) store_packet(&packets[t], 100 + i, i);
      check(load_packet(&packets[t]) == (uint64_t(9) << 32 | 109), "a thread sees its own packet");
    });
    for (uint64_t packet : packets)
      check(packet == (uint64_t(9) << 32 | 109), "packets of an address arrive in order");
  });
  with_schedules(20, [&] { check(!ring_fails(false, &error), "packets in a ring: " + error); });
  Options& o = options();
  int wrong = 0;
  for (o.seed = 1; o.seed <= 20; ++o.seed) wrong += ring_fails(true, &error);
  check(wrong == 20 && contains(error, "livelock"), "a packet that is never sent: " + error);
  const std::vector<std::string> names = sites();
  check(names.size() == 1 && contains(names[0], "packet_ready"), "the site of packet_ready");
  o = Options();
  o.fault = {Fault::skip, names[0]};
  check(ring_fails(false, &error), "notices that it takes stale packets");
  o = Options();
}

void test_order_of_arrival() {
  // Two packets of one thread: either may be seen first.
  bool first_alone = false, second_alone = false;
  with_schedules(20, [&] {
    uint64_t packets[2] = {};
    launch_body(one_block, [&](void*) {
      if (thread_index() == 0)
        for (uint64_t& packet : packets) store_packet(&packet, 1, 1);
      if (thread_index() != 32) return;
      bool seen[2] = {};
      while (!seen[0] && !seen[1])
        for (int i : {0, 1}) seen[i] = packet_ready(load_packet(&packets[i]), 1);
      first_alone |= !seen[1];
      second_alone |= !seen[0];
    });
  });
  check(first_alone && second_alone, "packets arrive in any order");
}

void test_errors() {
  struct Shared {
    float x[4];
    Mbarrier barrier;
  };
  const Grid pair = grid_of(2, 2, sizeof(Shared));
  const auto of = [](void* memory) -> Shared& { return *static_cast<Shared*>(memory); };
  const auto prepare = [&](void* memory, int arrivals) {
    if (thread_index() == 0) {
      mbarrier_init(&of(memory).barrier, arrivals);
      mbarrier_init_fence();
    }
    cluster_sync();
  };
  const auto expect_error = [&](const std::string& part, const std::function<void(void*)>& body) {
    with_schedules(5, [&] { check_error([&] { launch_body(pair, body); }, part); });
  };

  expect_error("exited", [](void*) {
    if (thread_index() >= 32) block_sync();
  });
  expect_error("deadlock", [&](void* memory) {
    prepare(memory, 1);
    if (thread_index() < 32)
      block_sync();
    else
      mbarrier_wait(&of(memory).barrier, 0);
  });
  expect_error("block_sync", [](void*) {
    if (thread_index() >= 32)
      block_sync();
    else
      block_sync();
  });
  expect_error("exited", [](void*) {
    if (thread_index() != 5) shuffle_xor(1.f, 1);
  });
  expect_error("multiply_add", [](void*) {
    float c[4] = {};
    if (thread_index() % 32 == 5)
      multiply_add<false>(c, {}, 0, 0);
    else
      shuffle_xor(1.f, 1);
  });
  int exited = 0;
  const uint64_t nothing = 0;
  expect_error("has exited", [&](void* memory) {
    prepare(memory, 1);
    if (block_index() == 1) ++exited;
    if (block_index() == 1 || thread_index() != 0) return;
    while (exited != 64) load_packet(&nothing);
    exited = 0;
    store_async(of(memory).x, 1, 1.f, &of(memory).barrier);
  });
  expect_error("beyond the 1", [&](void* memory) {
    prepare(memory, 1);
    if (thread_index() < 2) mbarrier_expect(&of(memory).barrier, 4);
    cluster_sync();
  });
  expect_error("not initialised", [&](void* memory) {
    if (thread_index() == 0) mbarrier_wait(&of(memory).barrier, 0);
  });
  expect_error("not initialised", [&](void* memory) {
    if (thread_index() == 0) store_async(of(memory).x, 1, 1.f, &of(memory).barrier);
    cluster_sync();
    cluster_sync();
  });
  expect_error("mbarrier_init_fence", [&](void* memory) {
    if (thread_index() == 0) mbarrier_init(&of(memory).barrier, 1);
    cluster_sync();
    store_async(of(memory).x, 1, 1.f, &of(memory).barrier);
    cluster_sync();
  });
  expect_error("overwritten", [&](void* memory) {
    prepare(memory, 1);
    of(memory).barrier = 0;
    mbarrier_expect(&of(memory).barrier, 4);
  });
  expect_error("initialised again", [&](void* memory) {
    prepare(memory, 1);
    prepare(memory, 1);
  });
  expect_error("destination is not within", [&](void* memory) {
    prepare(memory, 1);
    store_async(of(memory).x + 8, 1, 1.f, &of(memory).barrier);
  });
  expect_error("not aligned", [&](void* memory) {
    prepare(memory, 1);
    store_async(reinterpret_cast<Word4*>(of(memory).x + 1), 1, {}, &of(memory).barrier);
  });
  expect_error("rank 2", [&](void* memory) {
    prepare(memory, 1);
    store_async(of(memory).x, 2, 1.f, &of(memory).barrier);
  });
  expect_error("not aligned", [&](void* memory) { load4(of(memory).x + 1); });
#ifndef __SANITIZE_ADDRESS__
  expect_error("beyond its shared memory",
               [&](void* memory) { static_cast<char*>(memory)[sizeof(Shared)] = 1; });
#endif
  expect_error("threw: of its own", [](void*) {
    if (thread_index() == 40) throw std::runtime_error("of its own");
  });
}

void test_launches() {
  const auto nothing = [](void*) {};
  check_error([&] { launch_body({133, 1, true, 0, nullptr}, nothing); }, "132 fit");
  check_error([&] { launch_body(grid_of(3, 2, 0), nothing); }, "3 blocks in clusters of 2");
  check_error([&] { launch_body(grid_of(1, 1, 228 * 1024), nothing); }, "shared memory");
  launch_body({132, 1, true, 0, nullptr}, nothing);
  check(resident_blocks<Exchange>(1000).count == 132 &&
            resident_clusters<Exchange>(8, 1000).count == 8,
        "what is resident");
  check(resident_blocks<Exchange>(228 * 1024).count == 0 &&
            resident_clusters<Exchange>(8, 228 * 1024).refusal == "too much shared memory",
        "too much shared memory for any block");
  bool filled = true;
  launch_body(grid_of(2, 1, 1000), [&](void* memory) {
    const auto* const bytes = static_cast<const unsigned char*>(memory);
    filled = filled && std::all_of(bytes, bytes + 1000, [](int byte) { return byte == 0xff; }) &&
             reinterpret_cast<uintptr_t>(memory) % 128 == 0;
    block_sync();
    if (thread_index() == 0) std::memset(memory, 1, 1000);
  });
  check(filled, "shared memory is full of NaN");
}

void test_counts() {
  int runs = 0;
  const auto kernel = [&](void*) { runs += thread_index() == 0; };
  unsigned char memory[] = {1};
  int stream = 0;
  clear_launches();
  launch_body(one_block, kernel);
  options().run = false;
  launch_body(one_block, kernel);
  launch_body<32>(one_block, kernel);
  check(streams() == std::set<void*>{nullptr}, "a launch's stream is known");
  clear(memory, sizeof memory, &stream);
  check(streams() == std::set<void*>{nullptr, &stream}, "so is a clear's");
  check_error([&] { launch_body(grid_of(0, 1, 0), kernel); }, "a grid without blocks");
  options() = Options();
  check(runs == 1 && memory[0] == 1, "what is only counted does nothing");
  check(launches() == std::map<std::string, int64_t>{{"Body", 3}, {"clear", 1}},
        "launches are counted by the kernel's name, run or not");
  clear_launches();
  check(launches().empty() && streams().empty(), "the counts begin again");
}

// The same seed gives the same schedule.
void test_repeats() {
  std::vector<int> orders[3];
  for (int i = 0; i < 3; ++i) {
    options().seed = 77 + i / 2;
    launch_body(one_block, [&](void*) { orders[i].push_back(thread_index()); });
    options().seed = 1;
    launch_body(one_block, [](void*) {});
  }
  options() = Options();
  check(orders[0] == orders[1] && orders[0] != orders[2], "the seed determines the order");
}

}  // namespace

int main() {
  test_indices();
  test_shuffles();
  test_multiply_add<false>();
  test_multiply_add<true>();
  test_conversions();
  test_exchange();
  test_faults_of_exchange();
  test_packets();
  test_order_of_arrival();
  test_errors();
  test_launches();
  test_counts();
  test_repeats();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
