#include "layouts.h"

mmixer::cuda::Recurrences<mmixer::cuda::ForwardArguments> mmixer::cuda::cluster_forward() {
  return recurrences<Forward, ClusterExchange, ForwardArguments>(ClusterLayouts());
}
