// csrc/cuda/launch.h and a device's answers, by runtime_stub.cpp without a GPU.
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
    using Packet = uint64_t;
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
        std::to_string(resident.count) + " and '" + resident.refusal + "' instead of 0 and '" +
            part + "'");
}

void check_clusters() {
  runtime = {};
  check(resident_clusters<Clusters>(16, 1000).count == 8, "clusters at once");
  check(runtime.cluster == 16, "it is asked about clusters of 16");
  check(resident_clusters<Clusters>(16, 1000).refusal.empty(), "no refusal beside a count");

  // A build for 8.x alone on a GPU of 9.0: its cluster kernels are empty.
  runtime.ptx = 80;
  check_refused(resident_clusters<Clusters>(16, 1000),
                "install again with 90 in MMIXER_CUDA_ARCHS");

  // A device without such clusters may answer any of these.
  for (const cudaError_t error :
       {cudaErrorInvalidValue, cudaErrorUnknown, cudaErrorInvalidClusterSize,
        cudaErrorInvalidConfiguration, cudaErrorNotSupported}) {
    runtime = {};
    runtime.occupancy = error;
    check_refused(resident_clusters<Clusters>(16, 1000), "cudaOccupancyMaxActiveClusters(");
    check(runtime.cleared > 0, "the error is not the next call's too");
    runtime = {};
    runtime.attributes = error;
    check_refused(resident_clusters<Clusters>(16, 1000), "cudaFuncGetAttributes(");
  }
  runtime = {};
  runtime.set_attribute = cudaErrorInvalidValue;
  using Once = Nothing<true, 1>;
  check_refused(resident_clusters<Once>(16, 1000), "cudaFuncSetAttribute(");
  check_refused(resident_clusters<Once>(16, 1000), "cudaFuncSetAttribute(");  // it is tried again
  runtime = {};
  runtime.clusters = 0;
  check_refused(resident_clusters<Clusters>(16, 1000), "no cluster of 16 blocks fits");
  runtime = {};
  runtime.major = 8;
  check_refused(resident_clusters<Clusters>(16, 1000), "need compute capability 9.0");
  runtime = {};
  runtime.shared = 99 * 1024;
  check_refused(resident_clusters<Clusters>(16, 100 * 1024), "100 KiB of shared memory");

  // Errors that may pass, stay with the process or come of a capture are no answer to remember.
  for (const cudaError_t error : {cudaErrorMemoryAllocation, cudaErrorDevicesUnavailable,
                                  cudaErrorIllegalAddress, cudaErrorStreamCaptureUnsupported}) {
    runtime = {};
    runtime.occupancy = error;
    try {
      resident_clusters<Clusters>(16, 1000);
      check(false, "it is thrown");
    } catch (const std::runtime_error&) {
    }
  }
}

void check_blocks() {
  runtime = {};
  check(resident_blocks<Blocks>(1000).count == 132, "blocks at once");
  for (const cudaError_t error : {cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice}) {
    runtime.occupancy = error;
    check_refused(resident_blocks<Blocks>(1000), "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  }
  using Large = Nothing<false, 3>;
  runtime = {};
  check(resident_blocks<Blocks>(1000).count == 132 && runtime.set_calls == 0, "no need to ask");
  check(resident_blocks<Large>(100 * 1024).count == 132 && runtime.set_calls == 1,
        "more than 48 KiB");
  runtime.shared = 99 * 1024;
  check_refused(resident_blocks<Large>(100 * 1024), "100 KiB of shared memory");
  runtime = {};
  runtime.cooperative = 0;
  check_refused(resident_blocks<Blocks>(1000), "no cooperative launches");
  runtime = {};
  runtime.blocks = 0;
  check_refused(resident_blocks<Blocks>(1000), "no block fits");
  // Where no team fits, the path has no teams, and says why.
  runtime = {};
  runtime.multiprocessors = 3;
  using L = Layout<128, 4, 8, 1, 3>;
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
  runtime.major = 8, runtime.minor = 6;
  for (const cudaError_t error :
       {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction}) {
    runtime.attributes = error;
    check(refusal<Blocks>().find("no kernels for its compute capability 8.6: install again with 86 "
                                 "in MMIXER_CUDA_ARCHS") != std::string::npos,
          refusal<Blocks>());
  }
}

void check_launches() {
  runtime = {};
  using Kernel = Nothing<true, 2>;
  const Grid grid{16, 16, false, 1000, nullptr};
  for (int i = 0; i < 3; i++) launch<Kernel>(grid, {0});
  check(runtime.launches == 3 && runtime.set_calls == 2, "attributes are set once per kernel");
  check(runtime.most_shared == 227 * 1024, "all of the shared memory");
  runtime.device = 1;
  for (int i = 0; i < 3; i++) launch<Kernel>(grid, {0});
  check(runtime.launches == 6 && runtime.set_calls == 4, "and once per device");
  check(runtime.cluster == 16 && !runtime.cooperative_launch, "a launch in clusters");
  launch<Blocks>({4, 1, true, 1000, nullptr}, {0});
  check(runtime.cooperative_launch == 1 && !runtime.cluster, "a cooperative launch");
  launch<Blocks>({4, 1, false, 1000, nullptr}, {0});
  check(!runtime.cooperative_launch && !runtime.cluster, "a plain launch");
  check(runtime.threads == Blocks::threads, "as many threads as a block may have");
  launch<Blocks>({4, 1, false, 1000, nullptr, 16}, {0});
  check(runtime.threads == 16, "as many threads as are asked for");
  check(number_of(nullptr) != number_of(nullptr), "the runtime numbers streams, not their handles");
}

}  // namespace

int main() {
  check_clusters();
  check_blocks();
  check_refusal();
  check_launches();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
