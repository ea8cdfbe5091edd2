// A probe of the CUDA engine on this GPU, without Python and torch: it takes seconds, and a kernel
// that hangs takes nothing with it but this process.
//
//   cmake --build BUILD --target gpu_probe
//   gpu_probe facts    the device, clusters and teams at once, launches
//   gpu_probe network  latency of an exchange, in a cluster and through L2
//   gpu_probe kernels PATH DIRECTION [WHICH]
//                      of each kernel: does it end, are 20 runs equal to the bit, how far is
//                      forward from float64, microseconds per step
//   gpu_probe cell     the same of the kernel of one step
//   gpu_probe once PATH DIRECTION [WHICH]
//                      one run of 3 steps of each kernel, for compute-sanitizer
//   gpu_probe once cell
//                      the same of the kernel of one step
//
// PATH is cluster, cooperative or wide; DIRECTION is forward or backward; WHICH is H [TERMS
// [TERM_DTYPE [SAMPLES]]], such as 512 1 bfloat16 8. All of them run B = 8 samples, so that their
// times compare. Each line of the output is a JSON object. Exit status: 0; 1 for a kernel whose
// runs differ, are not finite or are wrong; 2 for an error; 3 for a kernel that did not end within
// 3 s (25 s with `once`).
#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cuda/kernels.h"
#include "../csrc/cuda/launch.h"

namespace mmixer::cuda {
namespace {

enum Status { fine, wrong, failed, hangs };
constexpr int batch = 8, runs = 20;

// The terms of a float in a kernel's products, and the relative error of its states that is too
// large: some ten times that under the emulator, as a GPU's tensor cores and tanh round otherwise.
struct Terms {
  int count;
  Dtype dtype;
  double bound;
};

// The sizes that matter most come first.
constexpr int sizes[] = {512, 128, 256, 768, 1024};
constexpr Terms every_terms[] = {{1, Dtype::bfloat16, 4e-3},
                                 {1, Dtype::float16, 5e-4},
                                 {2, Dtype::bfloat16, 2e-5},
                                 {3, Dtype::bfloat16, 2e-6}};
constexpr int team_samples[] = {8, 4};
constexpr const char* paths[] = {"cluster", "cooperative", "wide"};  // as in Path
#ifdef __CUDACC__
constexpr int short_run = 64, long_run = 1024;  // steps
constexpr int rounds = 200;                     // of an exchange
#else                                           // in tests, by csrc/emulator on a CPU
constexpr int short_run = 4, long_run = 8, rounds = 8;
#endif

double patience = 3;  // seconds

// A line of the output. It is there even where the next call hangs.
__attribute__((format(printf, 1, 2))) void print(const char* format, ...) {
  va_list words;
  va_start(words, format);
  std::vprintf(format, words);
  va_end(words);
  std::printf("\n");
  std::fflush(stdout);
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c >= 0 && c < ' ' ? ' ' : c;
  }
  return result + "\"";
}

void check_call(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

#define CHECK(call) check_call(call, #call)

// Ends the process where the device has not come to the end of its work; `what`: the fields of a
// record.
void wait_or_exit(const std::string& what) {
  cudaEvent_t done;
  CHECK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
  CHECK(cudaEventRecord(done));
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const cudaError_t answer = cudaEventQuery(done);
    if (answer == cudaSuccess) break;
    if (answer != cudaErrorNotReady) CHECK(answer);
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    if (passed.count() > patience) {
      print("{\"kind\": \"hang\", %s}", what.c_str());
      _exit(hangs);  // the context cannot be destroyed before the kernel ends
    }
  }
  CHECK(cudaEventDestroy(done));
}

// Median milliseconds of a call on the GPU, the first one apart.
double milliseconds(const std::string& what, const std::function<void()>& call, int rounds = 7) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> all(rounds);
  for (int i = -1; i < rounds; i++) {
    CHECK(cudaEventRecord(start));
    call();
    CHECK(cudaEventRecord(end));
    wait_or_exit(what);
    if (i >= 0) CHECK(cudaEventElapsedTime(&all[i], start, end));
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  std::sort(all.begin(), all.end());
  return all[rounds / 2];
}

template <class T>
class Array {
 public:
  explicit Array(size_t size) : size_(size) {
    CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)));
    poison();
  }
  Array(size_t size, const std::vector<T>& repeated) : Array(size) {
    for (size_t i = 0; i < size; i += repeated.size())
      CHECK(cudaMemcpy(data_ + i, repeated.data(), std::min(repeated.size(), size - i) * sizeof(T),
                       cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data_); }

  // Every float a NaN.
  void poison() { CHECK(cudaMemset(data_, 0xff, size_ * sizeof(T))); }

  std::vector<T> first(size_t count) const {
    std::vector<T> x(count);
    CHECK(cudaMemcpy(x.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
    return x;
  }

  size_t size() const { return size_; }
  T* data() const { return data_; }

 private:
  size_t size_;
  T* data_ = nullptr;
};

std::vector<float> random_floats(size_t size, float low, float high) {
  static std::mt19937 generator(7);
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> x(std::min(size, size_t(1) << 20));
  for (float& value : x) value = uniform(generator);
  return x;
}

// x as bfloat16 or float16. It is truncated: the terms' sum is what counts.
uint16_t narrow(float x, Dtype dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == Dtype::bfloat16) return uint16_t(bits >> 16);
  if (std::fabs(x) < 0x1p-14f) return 0;  // what is not normal in float16
  return uint16_t((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)));
}

float widen(uint16_t x, Dtype dtype) {
  uint32_t bits = uint32_t(x) << 16;
  if (dtype == Dtype::float16 && x)
    bits = (bits & 0x80000000) | ((uint32_t(x & 0x7fff) << 13) + (112u << 23));
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// W_r, W_z and W_h: their terms [terms][3][H][H], and the sums of these.
struct RandomWeights {
  std::vector<uint16_t> terms;
  std::vector<float> sum;

  RandomWeights(const Terms& kind, int H)
      : terms(size_t(kind.count) * step_gates * H * H), sum(size_t(step_gates) * H * H) {
    const float bound = 1 / std::sqrt(float(H));
    const std::vector<float> x = random_floats(sum.size(), -bound, bound);
    for (size_t i = 0; i < sum.size(); i++) {
      float rest = x[i % x.size()];
      for (int j = 0; j < kind.count; j++) {
        const uint16_t term = narrow(rest, kind.dtype);
        terms[j * sum.size() + i] = term;
        sum[i] += widen(term, kind.dtype), rest -= widen(term, kind.dtype);
      }
    }
  }
};

// ---- the persistent kernels there are

using Words = std::vector<std::string>;

// On this GPU; plan.H is 0 where it cannot run it.
struct PersistentKernel {
  Variant variant;
  Terms terms;
  bool backward;
  int H;
  Plan plan;
  std::string fields;  // of a record

  int teams() const { return batch / variant.samples; }
};

Path path_of(const std::string& name) {
  const auto found = std::find(std::begin(paths), std::end(paths), name);
  if (found == std::end(paths))
    throw std::invalid_argument("PATH must be cluster, cooperative or wide, but is " + name);
  return Path(found - paths);
}

bool is_backward(const std::string& direction) {
  if (direction != "forward" && direction != "backward")
    throw std::invalid_argument("DIRECTION must be forward or backward, but is " + direction);
  return direction == "backward";
}

// Calls each(kernel) for every one of a path that begins with the words of `which`, also for those
// that this GPU cannot run.
void for_kernels(const std::string& path, const std::string& direction, const Words& which,
                 const std::function<void(const PersistentKernel&)>& each) {
  for (const int H : sizes)
    for (const Terms& terms : every_terms)
      for (const int samples : team_samples) {
        const Variant variant{path_of(path), samples, terms.count, terms.dtype};
        const std::string dtype = terms.dtype == Dtype::float16 ? "float16" : "bfloat16";
        const std::string words[] = {std::to_string(H), std::to_string(terms.count), dtype,
                                     std::to_string(samples)};
        const bool backward = is_backward(direction);
        if (!std::equal(which.begin(), which.end(), words)) continue;
        const Plan chosen = plan(variant, H, backward);
        const bool there_is_none = chosen.refusal.rfind("no kernel for", 0) == 0;
        if (there_is_none || (chosen.H != H && chosen.H != 0)) continue;
        each({variant, terms, backward, H, chosen,
              "\"path\": " + quoted(path) + ", \"direction\": " + quoted(direction) +
                  ", \"hidden\": " + words[0] + ", \"terms\": " + words[1] +
                  ", \"term_dtype\": " + quoted(dtype) + ", \"samples\": " + words[3]});
      }
}

// ---- facts

struct NothingArguments {
  int unused;
};

template <bool cluster>
struct Nothing {
  using Arguments = NothingArguments;
  static constexpr int threads = 256;
  static constexpr bool needs_cluster = cluster;
  static MMIXER_DEVICE void run(void*, const Arguments&) {}
};

template <class Kernel>
void time_launches(const char* name, const Grid& grid) {
  constexpr int count = 200;
  const std::string what = "\"path\": \"launch, " + std::string(name) + "\"";
  const double time = milliseconds(what, [&] {
    for (int i = 0; i < count; i++) launch<Kernel>(grid, {0});
  });
  print("{\"kind\": \"launch\", \"what\": \"%s\", \"us\": %.2f}", name, 1e3 * time / count);
}

int facts() {
  cudaDeviceProp device;
  int clock = 0, runtime = 0, driver = 0;
  CHECK(cudaGetDeviceProperties(&device, 0));
  CHECK(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
  CHECK(cudaRuntimeGetVersion(&runtime));
  CHECK(cudaDriverGetVersion(&driver));
  print(
      "{\"kind\": \"device\", \"name\": %s, \"capability\": \"%d.%d\", \"multiprocessors\": %d, "
      "\"l2_mib\": %d, \"clock_mhz\": %d, \"runtime\": %d, \"driver\": %d}",
      quoted(device.name).c_str(), device.major, device.minor, device.multiProcessorCount,
      int(device.l2CacheSize >> 20), clock / 1000, runtime, driver);
  if (const std::string why = refusal(); !why.empty()) throw std::runtime_error(why);
  for (const int size : {8, 16}) {
    const Resident clusters = resident_clusters<Nothing<true>>(size, 0);
    print("{\"kind\": \"clusters\", \"size\": %d, \"at_once\": %d, \"why\": %s}", size,
          clusters.count, quoted(clusters.refusal).c_str());
  }
  for (const char* const path : paths)
    for (const char* const direction : {"forward", "backward"})
      for_kernels(path, direction, {}, [](const PersistentKernel& kernel) {
        print("{\"kind\": \"teams\", %s, \"teams\": %d, \"why\": %s}", kernel.fields.c_str(),
              kernel.plan.teams, quoted(kernel.plan.refusal).c_str());
      });
  time_launches<Nothing<false>>("plain", {128, 1, false, 0, nullptr});
  time_launches<Nothing<false>>("cooperative", {128, 1, true, 0, nullptr});
  if (resident_clusters<Nothing<true>>(16, 0).count)
    time_launches<Nothing<true>>("cluster", {16, 16, false, 0, nullptr});
  return fine;
}

// ---- network

constexpr int most_bytes = 16384, warm_rounds = 8;

struct NetworkArguments {
  int blocks, bytes;  // of a cluster; an operand, of all its blocks
  uint64_t* packets;
  int64_t *cycles, *nanoseconds;  // per block, of `rounds`
};

struct Time {
  int64_t cycles, nanoseconds;
};

MMIXER_DEVICE Time now() {
#ifdef __CUDACC__
  int64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return {clock64(), nanoseconds};
#else
  return {0, 0};
#endif
}

// The ways in which a wait makes visible what arrived. The kernels' own way is acquire_shared, and
// acquire_cluster where the compiler does not know the fence of shared memory alone, which is
// PTX 8.6's.
enum class Wait { acquire_cluster, acquire_shared, acquire_block };
constexpr const char* wait_names[] = {"acquire.cluster", "relaxed and a fence of shared memory",
                                      "acquire.cta"};
#if defined(__CUDACC__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1208
constexpr bool has_shared_fence = false;
#else
constexpr bool has_shared_fence = true;
#endif

template <Wait wait>
MMIXER_DEVICE void wait_on(Mbarrier* barrier, uint32_t parity) {
#ifdef __CUDACC__
  if constexpr (wait == Wait::acquire_cluster) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
    return;
  } else if constexpr (wait == Wait::acquire_block) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again%=:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
    return;
  }
#endif
  mbarrier_wait(barrier, parity);
}

enum class Traffic { one_way, statistics, all_gather };
constexpr const char* traffic_names[] = {"one-way", "statistics", "all-gather"};

// Rounds of what exchange.h sends. one_way: a float from block 0 to 1 and back. statistics: a float
// per warp, from each block to each. all_gather: an operand's rows, 16 bytes per lane.
template <Traffic traffic, Wait wait>
struct Network {
  using Arguments = NetworkArguments;
  static constexpr int threads = 256;
  static constexpr bool needs_cluster = true;
  struct Shared {
    alignas(16) unsigned char landing[2][most_bytes];
    Mbarrier barrier[2];
  };

  static MMIXER_DEVICE void run(void* memory, const Arguments& a) {
    Shared& shared = *static_cast<Shared*>(memory);
    const int rank = block_index() % a.blocks;
    const int expected = traffic == Traffic::one_way ? int(sizeof(float)) : a.bytes;
    if (thread_index() == 0) {
      for (Mbarrier& barrier : shared.barrier) mbarrier_init(&barrier, 1);
      mbarrier_init_fence();
      for (Mbarrier& barrier : shared.barrier) mbarrier_expect(&barrier, expected);
    }
    cluster_sync();
    Time start = now();
    for (int round = 0; round < warm_rounds + rounds; round++) {
      if (round == warm_rounds) start = now();
      Mbarrier* const barrier = &shared.barrier[round % 2];
      const uint32_t parity = round / 2 % 2;
      if constexpr (traffic == Traffic::one_way) {
        if (rank < 2 && thread_index() == 0) {
          if (rank == 1) receive(barrier, parity, expected);
          store_async(reinterpret_cast<float*>(shared.landing[round % 2]), 1 - rank, 1.f, barrier);
          if (rank == 0) receive(barrier, parity, expected);
        }
      } else {
        send(shared.landing[round % 2], rank, barrier, a);
        wait_on<wait>(barrier, parity);
        if (thread_index() == 0) mbarrier_expect(barrier, expected);
        block_sync();
      }
    }
    if (thread_index() == 0) {
      const Time end = now();
      a.cycles[block_index()] = end.cycles - start.cycles;
      a.nanoseconds[block_index()] = end.nanoseconds - start.nanoseconds;
    }
    warp_sync();
    cluster_sync();
  }

 private:
  // One thread's. The next store on this barrier follows one of ours, and so this.
  static MMIXER_DEVICE void receive(Mbarrier* barrier, uint32_t parity, int expected) {
    wait_on<wait>(barrier, parity);
    mbarrier_expect(barrier, expected);
  }

  static MMIXER_DEVICE void send(unsigned char* landing, int rank, Mbarrier* barrier,
                                 const Arguments& a) {
    if constexpr (traffic == Traffic::statistics) {
      const int lane = thread_index() % 32, warp = thread_index() / 32;
      if (lane < a.blocks)
        store_async(reinterpret_cast<float*>(landing) + rank * (threads / 32) + warp, lane, 1.f,
                    barrier);
    } else {
      const int chunks = a.bytes / a.blocks / int(sizeof(Word4));  // to each block
      for (int i = thread_index(); i < chunks * a.blocks; i += threads)
        store_async(reinterpret_cast<Word4*>(landing) + rank * chunks + i % chunks, i / chunks,
                    Word4{{1, 2, 3, 4}}, barrier);
    }
  }
};

// A packet from block 0 to 1 and back, through L2. Its tag is the round's number, from 1 on.
struct PacketPingPong {
  using Arguments = NetworkArguments;
  static constexpr int threads = 32;
  [[maybe_unused]] static constexpr bool needs_cluster = false;

  static MMIXER_DEVICE void run(void*, const Arguments& a) {
    if (thread_index() != 0) return;
    const int rank = block_index();
    uint64_t *const mine = a.packets + 64 * rank, *const others = a.packets + 64 * (1 - rank);
    Time start = now();
    for (int round = 0; round < warm_rounds + rounds; round++) {
      if (round == warm_rounds) start = now();
      const uint32_t tag = uint32_t(round) + 1;
      if (rank == 1) receive(mine, tag);
      store_packet(others, 0, tag);
      if (rank == 0) receive(mine, tag);
    }
    const Time end = now();
    a.cycles[rank] = end.cycles - start.cycles;
    a.nanoseconds[rank] = end.nanoseconds - start.nanoseconds;
  }

 private:
  static MMIXER_DEVICE void receive(const uint64_t* packet, uint32_t tag) {
    while (!packet_ready(load_packet(packet), tag)) {
    }
  }
};

// Prints one exchange: block 0's time over the rounds, and over the hops of a round.
void print_exchange(const NetworkArguments& a, const std::string& kind, int hops) {
  int64_t cycles, nanoseconds;
  CHECK(cudaMemcpy(&cycles, a.cycles, sizeof cycles, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(&nanoseconds, a.nanoseconds, sizeof nanoseconds, cudaMemcpyDeviceToHost));
  print("{%s, \"cycles\": %.0f, \"ns\": %.1f}", kind.c_str(), double(cycles) / rounds / hops,
        double(nanoseconds) / rounds / hops);
}

template <Traffic traffic, Wait wait>
void time_network(NetworkArguments a, int clusters) {
  using Kernel = Network<traffic, wait>;
  const std::string kind =
      "\"kind\": \"exchange\", \"what\": \"" + std::string(traffic_names[int(traffic)]) +
      "\", \"wait\": \"" + wait_names[int(wait)] + "\", \"blocks\": " + std::to_string(a.blocks) +
      ", \"clusters\": " + std::to_string(clusters) + ", \"bytes\": " + std::to_string(a.bytes);
  const Resident resident = resident_clusters<Kernel>(a.blocks, sizeof(typename Kernel::Shared));
  if (resident.count < clusters) {
    const std::string why = resident.count ? "" : ", \"why\": " + quoted(resident.refusal);
    print("{%s, \"at_once\": %d%s}", kind.c_str(), resident.count, why.c_str());
    return;
  }
  for (int i = 0; i < 2; i++) {
    launch<Kernel>({clusters * a.blocks, a.blocks, false, sizeof(typename Kernel::Shared), nullptr},
                   a);
    wait_or_exit("\"path\": \"network\", " + kind.substr(kind.find(',') + 2));
  }
  print_exchange(a, kind, traffic == Traffic::one_way ? 2 : 1);
}

template <Wait wait>
void time_networks(NetworkArguments a) {
  for (const int blocks : {8, 16}) {
    a.blocks = blocks;
    a.bytes = int(sizeof(float));
    time_network<Traffic::one_way, wait>(a, 1);
    a.bytes = blocks * 8 * int(sizeof(float));
    time_network<Traffic::statistics, wait>(a, 1);
    for (a.bytes = 1024; a.bytes <= most_bytes; a.bytes *= 2)
      time_network<Traffic::all_gather, wait>(a, 1);
  }
  // As many clusters as N = 3 modalities need, of 8 samples and of 4.
  a.blocks = 16;
  a.bytes = 8192;
  time_network<Traffic::all_gather, wait>(a, 3);
  a.bytes = 4096;
  time_network<Traffic::all_gather, wait>(a, 6);
}

int network() {
  Array<int64_t> cycles(256), nanoseconds(256);
  Array<uint64_t> packets(128);
  CHECK(cudaMemset(packets.data(), 0, 128 * sizeof(uint64_t)));
  NetworkArguments a{2, 0, packets.data(), cycles.data(), nanoseconds.data()};
  launch<PacketPingPong>({2, 1, true, 0, nullptr}, a);
  wait_or_exit("\"path\": \"network\", \"what\": \"L2\"");
  print_exchange(a, "\"kind\": \"l2\", \"what\": \"one-way\"", 2);
  time_networks<Wait::acquire_cluster>(a);
  if (has_shared_fence) time_networks<Wait::acquire_shared>(a);
  time_networks<Wait::acquire_block>(a);
  return fine;
}

// ---- kernels

// The operands of a direction's persistent kernels of one size and terms, for up to `steps` steps.
class Operands {
 public:
  Operands(const PersistentKernel& kernel, int steps)
      : backward_(kernel.backward),
        H_(kernel.H),
        terms_(kernel.terms),
        weights_(terms_, H_),
        norms_(random_floats(2 * gates * H_, -1, 1)),
        hx_(random_floats(batch * H_, -1, 1)),
        inputs_(random_floats(size_t(steps) * step_gates * batch * H_, -1, 1)),
        weights_there_(weights_.terms.size(), weights_.terms),
        norms_there_(norms_.size(), norms_),
        hx_there_(hx_.size(), hx_),
        inputs_there_(size_t(steps) * step_gates * batch * H_, inputs_),
        states_(size_t(steps) * batch * H_, random_floats(size_t(steps) * batch * H_, -1, 1)),
        output_(states_.size()),
        h_n_(hx_.size()),
        projected_(backward_ ? size_t(steps) * step_gates * batch * H_ : 1, inputs_),
        r_std_(size_t(steps) * step_gates * batch, random_floats(size_t(steps) * 24, 0.5f, 1.5f)),
        grad_output_(backward_ ? size_t(steps) * batch * H_ : 1, inputs_),
        grad_h_n_(hx_.size(), hx_),
        grad_gates_(backward_ ? size_t(steps) * step_gates * batch * H_ : 1),
        grad_f_tilde_(backward_ ? size_t(steps) * batch * H_ : 1),
        grad_hx_(hx_.size()),
        grad_norm_(size_t(2) * step_gates * batch * H_) {}

  bool are_for(const PersistentKernel& kernel) const {
    return H_ == kernel.H && terms_.count == kernel.terms.count &&
           terms_.dtype == kernel.terms.dtype;
  }

  void run(const PersistentKernel& kernel, uint64_t* packets, int steps) const {
    if (backward_) {
      BackwardArguments a{};
      a.weights = weights_there_.data(), a.x_hat = inputs_there_.data();
      a.projected = projected_.data(), a.r_std = r_std_.data();
      a.norms = {norms_there_.data(), true}, a.first_reverse = 1;
      a.states = states_.data(), a.hx = hx_there_.data(), a.grad_output = grad_output_.data();
      a.grad_output_stride = {0, int64_t(batch) * H_, H_};
      a.grad_h_n = grad_h_n_.data(), a.grad_h_n_stride_sample = H_,
      a.grad_gates = grad_gates_.data();
      a.grad_f_tilde = grad_f_tilde_.data(), a.grad_hx = grad_hx_.data();
      a.grad_norm = grad_norm_.data(), a.packets = packets;
      a.G = 1, a.T = steps, a.B = batch, a.H = H_;
      recurrence_backward(kernel.variant, kernel.plan.teams, a, false, nullptr);
    } else {
      ForwardArguments a{};
      a.weights = weights_there_.data(), a.input_gates = inputs_there_.data();
      a.norms = {norms_there_.data(), true}, a.first_reverse = 1;
      a.hx = hx_there_.data(), a.states = states_.data();
      a.output = output_.data(), a.h_n = h_n_.data(), a.packets = packets;
      a.output_stride = {0, int64_t(batch) * H_, H_};
      a.G = 1, a.T = steps, a.B = batch, a.H = H_, a.eps = 1e-5f;
      recurrence(kernel.variant, kernel.plan.teams, a, false, nullptr);
    }
  }

  // All that a run of so many steps writes. What it does not write is NaN.
  std::vector<float> results(const PersistentKernel& kernel, uint64_t* packets, int steps) {
    std::vector<std::pair<Array<float>*, size_t>> outputs;
    const size_t step = size_t(batch) * H_;
    if (backward_)
      outputs = {{&grad_gates_, steps * step_gates * step},
                 {&grad_f_tilde_, steps * step},
                 {&grad_hx_, step},
                 {&grad_norm_, 2 * step_gates * step}};
    else
      outputs = {{&states_, steps * step}};
    for (const auto& [array, size] : outputs) array->poison();
    run(kernel, packets, steps);
    wait_or_exit(kernel.fields);
    std::vector<float> all;
    for (const auto& [array, size] : outputs) {
      const std::vector<float> x = array->first(size);
      all.insert(all.end(), x.begin(), x.end());
    }
    return all;
  }

  // The error of the first steps' states, against Eq. 11-14 in float64.
  double error(const std::vector<float>& states) {
    if (truth_.size() != states.size()) truth_ = truth(int(states.size()) / (batch * H_));
    double difference = 0, norm = 0;
    for (size_t i = 0; i < states.size(); i++) {
      difference += (states[i] - truth_[i]) * (states[i] - truth_[i]);
      norm += truth_[i] * truth_[i];
    }
    return std::sqrt(difference / norm);
  }

 private:
  // As in the kernel, pre-activations have no mean to remove.
  std::vector<double> truth(int steps) const {
    std::vector<double> state(hx_.begin(), hx_.end()), all;
    for (int t = 0; t < steps; t++) {
      for (int s = 0; s < batch; s++) {
        double* const h = &state[size_t(s) * H_];
        const auto gate = [&](int which, const std::vector<double>& operand, auto activation) {
          std::vector<double> a(H_);
          double square = 0;
          for (int i = 0; i < H_; i++) {
            const float* const row = &weights_.sum[(size_t(which) * H_ + i) * H_];
            const size_t place = ((size_t(t) * batch + s) * step_gates + which) * H_ + i;
            a[i] = inputs_[place % inputs_.size()];
            for (int k = 0; k < H_; k++) a[i] += double(row[k]) * operand[k];
            square += a[i] * a[i];
          }
          const double scale = 1 / std::sqrt(square / H_ + 1e-5);
          for (int i = 0; i < H_; i++)
            a[i] = activation(a[i] * scale * norms_[(gate_r + which) * H_ + i] +
                              norms_[(gates + gate_r + which) * H_ + i]);
          return a;
        };
        const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
        const auto tanh = [](double x) { return std::tanh(x); };
        std::vector<double> operand(h, h + H_);
        const std::vector<double> r = gate(step_r, operand, sigmoid);
        const std::vector<double> z = gate(step_z, operand, sigmoid);
        for (int i = 0; i < H_; i++) operand[i] *= r[i];
        const std::vector<double> h_tilde = gate(step_h, operand, tanh);
        for (int i = 0; i < H_; i++) h[i] = z[i] * h_tilde[i] + (1 - z[i]) * h[i];
      }
      all.insert(all.end(), state.begin(), state.end());
    }
    return all;
  }

  const bool backward_;
  const int H_;
  const Terms terms_;
  const RandomWeights weights_;
  const std::vector<float> norms_, hx_, inputs_;  // inputs are repeated
  std::vector<double> truth_;
  Array<uint16_t> weights_there_;
  Array<float> norms_there_, hx_there_, inputs_there_;
  Array<float> states_;  // backward reads them
  Array<float> output_, h_n_, projected_, r_std_, grad_output_, grad_h_n_;
  Array<float> grad_gates_, grad_f_tilde_, grad_hx_, grad_norm_;
};

// The memory through which the teams of a kernel exchange their packets.
Array<uint64_t> packets_of(const PersistentKernel& kernel) {
  return Array<uint64_t>(size_t(kernel.teams() * kernel.plan.packets) / sizeof(uint64_t) + 1);
}

size_t not_finite(const std::vector<float>& x) {
  return std::count_if(x.begin(), x.end(), [](float value) { return !std::isfinite(value); });
}

int probe_kernel(const PersistentKernel& kernel, Operands& operands) {
  const char* const fields = kernel.fields.c_str();
  const Array<uint64_t> packets = packets_of(kernel);
  const auto results = [&](int steps) { return operands.results(kernel, packets.data(), steps); };
  const auto microseconds = [&](int steps) {
    return 1e3 * milliseconds(kernel.fields, [&] { operands.run(kernel, packets.data(), steps); });
  };
  const std::vector<float> begin = results(3);
  std::string more;
  bool right = true;
  if (!kernel.backward) {
    const double far = operands.error(begin);
    right = far < kernel.terms.bound;  // false for NaN
    more = ", \"error\": " + (std::isfinite(far) ? std::to_string(1e6 * far) + "e-6" : "null");
  }
  if (kernel.plan.teams < kernel.teams())
    more += ", \"why\": \"one team at a time: the time is that of both\"";
  const std::vector<float> expected = results(short_run);
  int differ = 0;
  for (int i = 0; i < runs; i++) {
    const std::vector<float> again = results(short_run);
    differ += std::memcmp(again.data(), expected.data(), expected.size() * sizeof(float)) != 0;
  }
  const size_t bad = not_finite(begin) + not_finite(expected);
  const double after_short = microseconds(short_run), after_long = microseconds(long_run);
  print(
      "{\"kind\": \"kernel\", %s, \"teams\": %d, \"us_per_step\": %.3f, \"us_%d\": %.1f, "
      "\"us_%d\": %.1f, \"not_finite\": %zu, \"differ\": %d, \"runs\": %d%s}",
      fields, kernel.plan.teams, (after_long - after_short) / (long_run - short_run), short_run,
      after_short, long_run, after_long, bad, differ, runs, more.c_str());
  return right && !bad && !differ ? fine : wrong;
}

int kernels(const std::string& path, const std::string& direction, const Words& which) {
  int status = fine, seen = 0;
  std::unique_ptr<Operands> operands;
  for_kernels(path, direction, which, [&](const PersistentKernel& kernel) {
    seen++;
    if (kernel.plan.H == 0) {
      print("{\"kind\": \"kernel\", %s, \"teams\": 0, \"why\": %s}", kernel.fields.c_str(),
            quoted(kernel.plan.refusal).c_str());
      return;
    }
    if (!operands || !operands->are_for(kernel)) {
      operands.reset();
      operands = std::make_unique<Operands>(kernel, long_run);
    }
    status = std::max(status, probe_kernel(kernel, *operands));
  });
  if (!seen) throw std::invalid_argument("there is no such kernel");
  return status;
}

// ---- cell

struct CellOperands {
  const int H, context_size, batch;
  Problem problem{};
  Group group{};
  CellPlan chosen;
  std::deque<Array<uint16_t>> weights;
  Array<float> norms, features, output;
  Array<uint64_t> workspace;

  // context_size: H, or 0 without context.
  CellOperands(int H, int context_size, int batch)
      : H(H),
        context_size(context_size),
        batch(batch),
        chosen(planned()),
        norms(2 * gates * H, random_floats(2 * gates * H, -1, 1)),
        features(size_t(batch) * H, random_floats(size_t(batch) * H, -1, 1)),
        output(size_t(batch) * H),
        workspace(size_t(chosen.workspace) / sizeof(uint64_t) + 1) {
    for (int gate = 0; gate < gates; gate++) {
      const size_t size = size_t(H) * H * (gate == gate_s ? 2 : 1);
      const float bound = 1 / std::sqrt(float(H));
      const std::vector<float> x = random_floats(size, -bound, bound);
      std::vector<uint16_t> rounded(x.size());
      std::transform(x.begin(), x.end(), rounded.begin(),
                     [](float value) { return narrow(value, Dtype::bfloat16); });
      weights.emplace_back(size, rounded);
    }
    CHECK(cudaMemset(workspace.data(), 0, size_t(chosen.workspace)));
    group.input = problem.hx = features.data();
    if (context_size) group.context = features.data();
    for (int gate = 0; gate < gates; gate++)
      if (has_gate(gate, context_size)) group.weight[gate] = weights[gate].data();
    group.norm_weight = norms.data(), group.norm_bias = norms.data() + gates * H;
  }

  CellPlan planned() {
    problem.batch = batch, problem.hidden = H, problem.eps = 1e-5;
    problem.weight_dtype = Dtype::bfloat16;
    problem.hx_stride_sample = H;
    group.input_stride_sample = group.input_size = H;
    group.context_stride_sample = group.context_size = context_size;
    return cell_plan(problem, group);
  }

  void run() const { cuda::cell(problem, group, chosen, output.data(), workspace.data(), nullptr); }

  std::vector<float> results(const std::string& what) {
    output.poison();
    run();
    wait_or_exit(what);
    return output.first(size_t(batch) * H);
  }
};

int cell() {
  constexpr int calls = 50;
  int status = fine;
  for (const int H : {512, 45})
    for (const auto& [context_size, batch] : {std::pair(H, 1), {H, 8}, {0, 1}, {0, 8}}) {
      CellOperands operands(H, context_size, batch);
      const std::string what = "\"path\": \"cell\", \"hidden\": " + std::to_string(H) +
                               ", \"context\": " + std::to_string(context_size) +
                               ", \"batch\": " + std::to_string(batch);
      if (operands.chosen.team_samples == 0) {
        print("{\"kind\": \"cell\", %s, \"why\": %s}", what.c_str(),
              quoted(operands.chosen.refusal).c_str());
        continue;
      }
      const std::vector<float> expected = operands.results(what);
      int differ = 0;
      for (int i = 0; i < runs; i++) {
        const std::vector<float> again = operands.results(what);
        differ += std::memcmp(again.data(), expected.data(), expected.size() * sizeof(float)) != 0;
      }
      const size_t bad = not_finite(expected);
      const double time = milliseconds(what, [&] {
        for (int i = 0; i < calls; i++) operands.run();
      });
      print(
          "{\"kind\": \"cell\", %s, \"us\": %.2f, \"not_finite\": %zu, \"differ\": %d, "
          "\"runs\": %d}",
          what.c_str(), 1e3 * time / calls, bad, differ, runs);
      if (bad || differ) status = wrong;
    }
  return status;
}

// ---- once

int once(const std::string& path, const std::string& direction, const Words& which) {
  constexpr int steps = 3;
  patience = 25;
  int count = 0;
  if (path == "cell") {
    for (const int context_size : {45, 0}) {
      CellOperands(45, context_size, 8).results("\"path\": \"cell\"");
      count++;
    }
  } else {
    for_kernels(path, direction, which, [&](const PersistentKernel& kernel) {
      if (kernel.plan.H == 0) return;
      count++;
      Operands(kernel, steps).results(kernel, packets_of(kernel).data(), steps);
    });
  }
  if (count == 0) throw std::runtime_error("no kernel of path " + path + " runs on this GPU");
  print("{\"kind\": \"once\", \"path\": %s, \"count\": %d}", quoted(path).c_str(), count);
  return fine;
}

int run(const Words& words) {
  const size_t count = words.size();
  if (count == 1 && words[0] == "facts") return facts();
  if (count == 1 && words[0] == "network") return network();
  if (count == 1 && words[0] == "cell") return cell();
  if (count == 2 && words[0] == "once" && words[1] == "cell") return once("cell", "", {});
  if (count >= 3 && count <= 7 && (words[0] == "kernels" || words[0] == "once"))
    return (words[0] == "once" ? once : kernels)(words[1], words[2],
                                                 {words.begin() + 3, words.end()});
  throw std::invalid_argument(
      "the arguments must be: facts | network | cell | once cell | "
      "kernels or once PATH DIRECTION [H [TERMS [TERM_DTYPE [SAMPLES]]]]");
}

}  // namespace
}  // namespace mmixer::cuda

int main(int count, char** words) {
  try {
    return mmixer::cuda::run(count > 1 ? mmixer::cuda::Words(words + 1, words + count)
                                       : mmixer::cuda::Words{""});
  } catch (const std::exception& error) {
    mmixer::cuda::print("{\"kind\": \"error\", \"what\": %s}",
                        mmixer::cuda::quoted(error.what()).c_str());
    return mmixer::cuda::failed;
  }
}
