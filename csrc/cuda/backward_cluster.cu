#include "layouts.h"

namespace mmixer::cuda {

Recurrences<BackwardArguments> cluster_backward() {
  static const auto all = recurrences<Backward, ClusterPath, BackwardArguments>(
      BackwardLayouts<OneTermInCluster, MoreTermsInCluster>());
  return all;
}

}  // namespace mmixer::cuda
