#include "layouts.h"

namespace mmixer::cuda {

Recurrences<ForwardArguments> cooperative_forward() {
  static const auto all = recurrences<Forward, CooperativePath, ForwardArguments>(
      ForwardLayouts<OneTermThroughL2, MoreTermsThroughL2>());
  return all;
}

}  // namespace mmixer::cuda
