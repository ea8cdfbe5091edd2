#include "layouts.h"

mmixer::cuda::Recurrences<mmixer::cuda::BackwardArguments> mmixer::cuda::cooperative_backward() {
  return recurrences<Backward, GlobalExchange, BackwardArguments>(CooperativeLayouts());
}
