// Bulk copies between global and shared memory, issued by one thread. Loads report their bytes to
// an mbarrier; stores are waited for in groups by the thread that issued them. Both belong to the
// asynchronous proxy: see fence_proxy_async_shared().
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-bulk-copy
#pragma once

#include "cuda/ptx/tensor_map.h"
#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/tma.h"

#else

namespace internvl::ptx {

// Fetches the tensor map itself, so that the first copy need not wait for it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-prefetch-prefetchu
INTERNVL_PTX_FN void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at coordinates c0 (innermost) to c3, which may be negative, to `dst`, a multiple of 128
// bytes; all bytes of the box count for the barrier, also those outside of the tensor.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
INTERNVL_PTX_FN void tma_load_4d(uint32_t dst, const TensorMap* map, int c0, int c1, int c2, int c3,
                                 uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
      "l"(map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

INTERNVL_PTX_FN void tma_load_5d(uint32_t dst, const TensorMap* map, int c0, int c1, int c2, int c3,
                                 int c4, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
      "l"(map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The box from shared memory to the tensor.
INTERNVL_PTX_FN void tma_store_4d(const TensorMap* map, uint32_t src, int c0, int c1, int c2,
                                  int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
      "[%1];" ::"l"(map),
      "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

INTERNVL_PTX_FN void tma_store_5d(const TensorMap* map, uint32_t src, int c0, int c1, int c2,
                                  int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(map),
      "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// Adds the box to the tensor, element by element, each addition on its own.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-reduce-async-bulk-tensor
INTERNVL_PTX_FN void tma_reduce_add_4d(const TensorMap* map, uint32_t src, int c0, int c1, int c2,
                                       int c3) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// `bytes` in a row, a multiple of 16; both addresses too.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk
INTERNVL_PTX_FN void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(mbarrier)
      : "memory");
}

INTERNVL_PTX_FN void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(dst)),
               "r"(src), "r"(bytes)
               : "memory");
}

// The thread's stores and reductions since its last commit become one group.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-commit-group
INTERNVL_PTX_FN void bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most the N youngest groups of the thread are under way.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-wait-group
template <int N>
INTERNVL_PTX_FN void bulk_wait_group() {
  static_assert(N >= 0, "bulk_wait_group: N counts groups");
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Waits until all but the N youngest groups have read their sources.
template <int N>
INTERNVL_PTX_FN void bulk_wait_group_read() {
  static_assert(N >= 0, "bulk_wait_group_read: N counts groups");
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

}  // namespace internvl::ptx

#endif
