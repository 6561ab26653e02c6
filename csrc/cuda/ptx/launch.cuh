// Launches a kernel, or says why it could not be launched.
#pragma once

#include <string>

#include "cuda/launch_status.h"
#include "cuda/ptx/device.cuh"

namespace internvl::ptx {

struct GridSize {
  unsigned x = 1, y = 1, z = 1;
};

struct LaunchConfig {
  const char* name = "kernel";  // for messages
  GridSize grid;
  int threads = 0;  // of a block, along x
  int shared_bytes = 0;
  void* stream = nullptr;
};

}  // namespace internvl::ptx

#if defined(INTERNVL_EMULATOR)

#include "emulator/launch.h"

#else

#include <cuda_runtime.h>

namespace internvl::ptx {

constexpr int kSharedBytesWithoutAsking = 48 * 1024;

inline LaunchStatus launch_status(const LaunchConfig& config, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return {std::string(config.name) + ": " + cudaGetErrorString(error)};
}

// Does not wait for the kernel. A grid without blocks is no launch.
template <class... Params, class... Args>
LaunchStatus launch(void (*kernel)(Params...), const LaunchConfig& config, const Args&... args) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return {};
  if (config.shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
    if (error != cudaSuccess) return launch_status(config, error);
  }
  kernel<<<dim3(config.grid.x, config.grid.y, config.grid.z), config.threads, config.shared_bytes,
           static_cast<cudaStream_t>(config.stream)>>>(args...);
  return launch_status(config, cudaGetLastError());
}

}  // namespace internvl::ptx

#endif
