// The language of csrc/cuda/ptx/device.cuh for the host compiler.
#pragma once

#include "emulator/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define INTERNVL_PTX_FN inline
#define INTERNVL_UNROLL
#define INTERNVL_NO_UNROLL
#define INTERNVL_GRID_CONSTANT

// What nvcc predefines for a thread; kernels live in namespace internvl.
namespace internvl {
using emulator::blockDim;
using emulator::blockIdx;
using emulator::gridDim;
using emulator::threadIdx;
}  // namespace internvl

namespace internvl::ptx {

inline uint32_t dynamic_shared() { return emulator::kSharedBase; }

}  // namespace internvl::ptx
