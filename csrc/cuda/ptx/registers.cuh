// Registers move between the warps of a block: those that need few give some back, those that need
// many then take them. No more is shared out than the launch gave the block: with one block to a
// multiprocessor, for each thread an even share of 65536, rounded down to a multiple of 8.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-setmaxnreg
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/registers.h"

#else

namespace internvl::ptx {

template <int N>
constexpr bool kRegisterCount = N >= 24 && N <= 256 && N % 8 == 0;

// Waits until N registers per thread are free, and takes them. All warps of the warpgroup.
template <int N>
INTERNVL_PTX_FN void set_max_registers_inc() {
  static_assert(kRegisterCount<N>, "multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Keeps N registers per thread, gives the others back. All warps of the warpgroup.
template <int N>
INTERNVL_PTX_FN void set_max_registers_dec() {
  static_assert(kRegisterCount<N>, "multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace internvl::ptx

#endif
