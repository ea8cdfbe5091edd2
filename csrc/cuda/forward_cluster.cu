#include "layouts.h"

namespace mmixer::cuda {

Recurrences<ForwardArguments> cluster_forward() {
  static const auto all = recurrences<Forward, ClusterPath, ForwardArguments>(
      ForwardLayouts<OneTermInCluster, MoreTermsInCluster>());
  return all;
}

}  // namespace mmixer::cuda
