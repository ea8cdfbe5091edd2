#include "layouts.h"

mmixer::cuda::Recurrences<mmixer::cuda::ForwardArguments> mmixer::cuda::cooperative_forward() {
  return recurrences<Forward, GlobalExchange, ForwardArguments>(CooperativeLayouts());
}
