// Barriers of a block and of a warp. `.aligned`: all lanes of a warp execute the same call. A
// barrier orders the memory accesses of the threads that take part.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/sync.h"

#else

namespace internvl::ptx {

// All threads of the block: bar.sync 0.
INTERNVL_PTX_FN void sync_threads() { asm volatile("bar.sync 0;" ::: "memory"); }

// Named barrier `id` (0 is sync_threads) of `threads` threads, a multiple of 32: arrives and waits.
INTERNVL_PTX_FN void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting.
INTERNVL_PTX_FN void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar_sync by the threads of a fixed barrier, for code that is shared by several.
template <int kId, int kThreads>
struct FixedBarrier {
  INTERNVL_PTX_FN static void sync() {
    if constexpr (kId == 0)
      sync_threads();
    else
      bar_sync(kId, kThreads);
  }
};

// sync_threads() that returns whether `value` held for any thread of the block: bar.red.or.
INTERNVL_PTX_FN bool sync_threads_or(bool value) {
  uint32_t r;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.u32 p, %1, 0;\n bar.red.or.pred q, 0, p;\n"
      " selp.u32 %0, 1, 0, q;\n}"
      : "=r"(r)
      : "r"(uint32_t{value})
      : "memory");
  return r != 0;
}

// sync_threads() that returns whether `value` held for all threads of the block: bar.red.and.
INTERNVL_PTX_FN bool sync_threads_and(bool value) {
  uint32_t r;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.u32 p, %1, 0;\n bar.red.and.pred q, 0, p;\n"
      " selp.u32 %0, 1, 0, q;\n}"
      : "=r"(r)
      : "r"(uint32_t{value})
      : "memory");
  return r != 0;
}

// The lanes of the warp wait for one another: bar.warp.sync. (The collectives of warp.cuh and
// ldmatrix order no memory.)
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar-warp-sync
INTERNVL_PTX_FN void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

}  // namespace internvl::ptx

#endif
