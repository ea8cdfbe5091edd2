#include "layouts.h"

mmixer::cuda::Recurrences<mmixer::cuda::BackwardArguments> mmixer::cuda::cluster_backward() {
  return recurrences<Backward, ClusterExchange, BackwardArguments>(ClusterLayouts());
}
