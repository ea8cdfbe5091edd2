#include "layouts.h"

namespace mmixer::cuda {

Recurrences<ForwardArguments> cooperative_forward() {
  static const auto all = recurrences<Forward, CooperativePath, ForwardArguments>(
      ForwardLayouts<OneTermThroughL2, MoreTermsThroughL2>());
  return all;
}

Recurrences<ForwardArguments> wide_forward() {
  static const auto all =
      recurrences<Forward, WidePath, ForwardArguments>(List<Wide<8>, Wide<4>>());
  return all;
}

}  // namespace mmixer::cuda
