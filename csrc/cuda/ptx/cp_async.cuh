// Asynchronous copies from global to shared memory. Nobody may read what a copy brings, nor write
// there, before the copying thread has waited for its group; other threads also need a barrier.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/cp_async.h"

#else

namespace internvl::ptx {

// 16 bytes around L1; `src_bytes` (0 to 16) are read, the rest is filled with zeros.
INTERNVL_PTX_FN void cp_async_cg_16(uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(src_bytes)
               : "memory");
}

// 8 bytes through L1; `src_bytes` (0 to 8) are read, the rest is filled with zeros.
INTERNVL_PTX_FN void cp_async_ca_8(uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(src_bytes)
               : "memory");
}

// 4 bytes through L1; `src_bytes` (0 to 4) are read, the rest is filled with zeros.
INTERNVL_PTX_FN void cp_async_ca_4(uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst),
               "l"(__cvta_generic_to_global(src)), "r"(src_bytes)
               : "memory");
}

// The thread's copies since its last commit become one group; it may be empty.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-commit-group
INTERNVL_PTX_FN void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the N youngest groups of the thread are under way.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-wait-group
template <int N>
INTERNVL_PTX_FN void cp_async_wait_group() {
  static_assert(N >= 0, "cp_async_wait_group: N counts groups");
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace internvl::ptx

#endif
