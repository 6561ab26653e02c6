// The language that kernels are written in. nvcc knows it; the host compiler gets it from the
// emulator (tests/emulator), which runs the same kernel sources on the CPU.
//
// Kernels reach memory and instructions only through the functions of this folder: one instruction,
// one function. Shared memory is a 32-bit address: dynamic_shared() + offsetof(Storage, member).
#pragma once

#include <cstdint>

#if defined(INTERNVL_EMULATOR)

#include "emulator/device.h"

#else

#define INTERNVL_PTX_FN __device__ __forceinline__
#define INTERNVL_UNROLL _Pragma("unroll")
#define INTERNVL_NO_UNROLL _Pragma("unroll 1")
// A kernel parameter whose address the kernel takes: `const INTERNVL_GRID_CONSTANT Plan plan`.
#define INTERNVL_GRID_CONSTANT __grid_constant__

namespace internvl::ptx {

// Address of the block's dynamic shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvta
INTERNVL_PTX_FN uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char internvl_dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(internvl_dynamic_shared));
}

}  // namespace internvl::ptx

#endif
