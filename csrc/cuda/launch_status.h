// What became of a kernel launch. Free of CUDA and of PyTorch: crosses the line between the two.
#pragma once

#include <string>

namespace internvl {

struct LaunchStatus {
  std::string error;  // empty: launched

  bool ok() const { return error.empty(); }
};

}  // namespace internvl
