// What csrc/cuda/launch.h makes of a device's answers, over tests/csrc/runtime_stub.cpp: no GPU.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/layouts.h"
#include "runtime_stub.h"

using namespace mmixer::cuda;

namespace {

struct NoArguments {
  int unused;
};

// Each number is a kernel of its own, and so has attributes of its own.
template <bool cluster, int number = 0>
struct Nothing {
  using Arguments = NoArguments;
  static constexpr int threads = 32;
  static constexpr bool needs_cluster = cluster;
  struct Exchange {
    static constexpr int packets = 0;
  };
  struct Shared {
    char bytes[1024];
  };
  static MMIXER_DEVICE void run(void*, const Arguments&) {}
};
using Clusters = Nothing<true>;
using Blocks = Nothing<false>;

int failures = 0;

void check(bool holds, const std::string& what) {
  if (!holds) std::printf("FAILED: %s\n", what.c_str()), failures++;
}

void check_refused(const Resident& resident, const std::string& part) {
  check(resident.count == 0 && resident.refusal.find(part) != std::string::npos,
        std::to_string(resident.count) + " and '" + resident.refusal + "' instead of 0 and '" + part +
            "'");
}

void check_clusters() {
  runtime = {};
  check(resident_clusters<Clusters>(16, 1000).count == 8, "clusters at once");
  check(resident_clusters<Clusters>(16, 1000).refusal.empty(), "no refusal beside a count");

  // A build for 8.x alone on a GPU of 9.0: its cluster kernels are empty.
  runtime.ptx = 80;
  check_refused(resident_clusters<Clusters>(16, 1000), "MMIXER_CUDA_ARCHS=90");

  // Whatever a device without such clusters answers.
  for (const cudaError_t error :
       {cudaErrorInvalidValue, cudaErrorUnknown, cudaErrorInvalidClusterSize,
        cudaErrorInvalidConfiguration, cudaErrorNotSupported}) {
    runtime = {};
    runtime.occupancy = error;
    check_refused(resident_clusters<Clusters>(16, 1000), "cudaOccupancyMaxActiveClusters: error");
    check(runtime.cleared > 0, "the error is not the next call's too");
    runtime = {};
    runtime.attributes = error;
    check_refused(resident_clusters<Clusters>(16, 1000), "cudaFuncGetAttributes: error");
  }
  runtime = {};
  runtime.set_attribute = cudaErrorInvalidValue;
  check_refused(resident_clusters<Nothing<true, 1>>(16, 1000), "cudaFuncSetAttribute: error");
  runtime = {};
  runtime.clusters = 0;
  check_refused(resident_clusters<Clusters>(16, 1000), "no cluster of 16 blocks fits");
  runtime = {};
  runtime.major = 8;
  check_refused(resident_clusters<Clusters>(16, 1000), "need compute capability 9.0");
  runtime = {};
  runtime.shared = 99 * 1024;
  check_refused(resident_clusters<Clusters>(16, 100 * 1024), "100 KiB of shared memory");

  // Memory may be there later: no answer for ever.
  runtime = {};
  runtime.occupancy = cudaErrorMemoryAllocation;
  try {
    resident_clusters<Clusters>(16, 1000);
    check(false, "a lack of memory is thrown");
  } catch (const std::runtime_error&) {
  }
}

void check_blocks() {
  runtime = {};
  check(resident_blocks<Blocks>(1000).count == 132, "blocks at once");
  for (const cudaError_t error : {cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice}) {
    runtime.occupancy = error;
    check_refused(resident_blocks<Blocks>(1000), "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  }
  runtime = {};
  runtime.cooperative = 0;
  check_refused(resident_blocks<Blocks>(1000), "no cooperative launches");
  runtime = {};
  runtime.blocks = 0;
  check_refused(resident_blocks<Blocks>(1000), "no block fits");
  // A team that does not fit: a path without teams, and why.
  runtime = {};
  runtime.multiprocessors = 3;
  using L = Layout<128, 4, 4, 1, 6>;
  check_refused((resident_teams<Blocks, L>()), "a team has 4 blocks, and this GPU runs 3 at once");
}

void check_refusal() {
  runtime = {};
  check(refusal<Blocks>().empty(), "a kernel that can run");
  runtime.attributes = cudaErrorInsufficientDriver, runtime.driver = 12080;
  check(refusal<Blocks>().find("serves CUDA 12.8 at most, but this build is of CUDA 13.0") !=
            std::string::npos,
        refusal<Blocks>());
  runtime = {};
  runtime.attributes = cudaErrorNoKernelImageForDevice, runtime.major = 8, runtime.minor = 6;
  check(refusal<Blocks>().find("no kernels for its compute capability 8.6: install again with "
                               "MMIXER_CUDA_ARCHS=86") != std::string::npos,
        refusal<Blocks>());
}

void check_attributes_are_set_once() {
  runtime = {};
  using Kernel = Nothing<true, 2>;
  const Grid grid{16, 16, false, 1000, nullptr};
  for (int i = 0; i < 3; i++) launch<Kernel>(grid, {0});
  check(runtime.launches == 3 && runtime.set_calls == 2, "once per kernel");
  check(runtime.most_shared == 227 * 1024, "all of the shared memory");
  runtime.device = 1;
  for (int i = 0; i < 3; i++) launch<Kernel>(grid, {0});
  check(runtime.launches == 6 && runtime.set_calls == 4, "and once per device");
}

}  // namespace

int main() {
  check_clusters();
  check_blocks();
  check_refusal();
  check_attributes_are_set_once();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
