#include "layouts.h"

namespace mmixer::cuda {

Recurrences<BackwardArguments> cooperative_backward() {
  static const auto all = recurrences<Backward, CooperativePath, BackwardArguments>(
      BackwardLayouts<OneTermThroughL2, MoreTermsThroughL2>());
  return all;
}

Recurrences<BackwardArguments> wide_backward() {
  static const auto all =
      recurrences<Backward, WidePath, BackwardArguments>(List<Wide<8>, Wide<4>>());
  return all;
}

}  // namespace mmixer::cuda
