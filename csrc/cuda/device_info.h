// What a launch needs to know about the device it goes to. Free of CUDA and of PyTorch.
#pragma once

namespace internvl {

struct DeviceInfo {
  int multiprocessors = 0;
  int compute_capability = 0;  // 10 * major + minor
  int max_shared_bytes = 0;    // largest dynamic shared memory of a block, after opting in
};

}  // namespace internvl
