// The device a call goes to. Torch-free; needs the CUDA runtime.
#pragma once

#include "cuda/device_info.h"
#include "cuda/launch_status.h"

namespace internvl::cuda {

// Makes device `index` current for this library's own copy of the runtime, and describes it; it is
// asked once per process. An error names what is wrong: no device, a driver that is older than the
// runtime, a compute capability below 8.0.
LaunchStatus use_device(int index, DeviceInfo* device);

}  // namespace internvl::cuda
