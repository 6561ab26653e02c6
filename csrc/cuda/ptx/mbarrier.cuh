// Barriers in shared memory that count arrivals and bytes of asynchronous copies: 8 bytes at an
// 8-byte address. A phase completes when all arrivals and all announced bytes have come; then the
// next phase begins with the same number of arrivals. What was done before an arrival is seen after
// a wait for that phase, and so is what the copies brought.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/mbarrier.h"

#else

namespace internvl::ptx {

// By one thread; others may use the barrier after fence_mbarrier_init() and a barrier of the block.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-init
INTERNVL_PTX_FN void mbarrier_init(uint32_t addr, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(addr), "r"(arrivals) : "memory");
}

// Makes the barriers that the thread has initialised known to the units that copy.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar-fence
INTERNVL_PTX_FN void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival of the current phase.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-arrive
INTERNVL_PTX_FN void mbarrier_arrive(uint32_t addr) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(addr) : "memory");
}

// The current phase waits for `bytes` more.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-expect-tx
INTERNVL_PTX_FN void mbarrier_expect_tx(uint32_t addr, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(addr), "r"(bytes)
               : "memory");
}

// mbarrier_expect_tx, then mbarrier_arrive.
INTERNVL_PTX_FN void mbarrier_arrive_expect_tx(uint32_t addr, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(addr), "r"(bytes)
               : "memory");
}

// Has the phase of that parity completed? May wait for a while first. `parity` is that of the phase
// asked for, the first one having 0: true as long as the current phase has the other one.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier-test-wait-try-wait
INTERNVL_PTX_FN bool mbarrier_try_wait_parity(uint32_t addr, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(addr), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits until the phase of that parity has completed.
INTERNVL_PTX_FN void mbarrier_wait_parity(uint32_t addr, uint32_t parity) {
  while (!mbarrier_try_wait_parity(addr, parity)) {
  }
}

// An arrival that comes when all earlier cp.async of the thread have landed; it is one of those
// that mbarrier_init counted.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-mbarrier-arrive
INTERNVL_PTX_FN void cp_async_mbarrier_arrive_noinc(uint32_t addr) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(addr) : "memory");
}

// Orders the thread's own reads and writes of shared memory before later ones by wgmma and bulk
// copies (the asynchronous proxy), of its own and of threads that meet it in a barrier afterwards.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar-fence
INTERNVL_PTX_FN void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace internvl::ptx

#endif
