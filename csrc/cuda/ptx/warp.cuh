// Collectives of a full warp: all 32 lanes execute the same call. They exchange registers and order
// no memory.
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/warp.h"

#else

namespace internvl::ptx {

// The value of lane `lane ^ lane_mask`: shfl.sync.bfly.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-shfl-sync
template <class T>
INTERNVL_PTX_FN T shfl_bfly(T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "shfl_bfly moves 4 bytes");
  uint32_t r;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(r)
               : "r"(bits_as<uint32_t>(value)), "r"(lane_mask));
  return bits_as<T>(r);
}

// The value of lane `lane`: shfl.sync.idx.
template <class T>
INTERNVL_PTX_FN T shfl_idx(T value, int lane) {
  static_assert(sizeof(T) == 4, "shfl_idx moves 4 bytes");
  uint32_t r;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(r)
               : "r"(bits_as<uint32_t>(value)), "r"(lane));
  return bits_as<T>(r);
}

// Does `value` hold for some lane: vote.sync.any.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-vote-sync
INTERNVL_PTX_FN bool vote_any(bool value) {
  uint32_t r;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.u32 p, %1, 0;\n vote.sync.any.pred q, p, 0xffffffff;\n"
      " selp.u32 %0, 1, 0, q;\n}"
      : "=r"(r)
      : "r"(uint32_t{value}));
  return r != 0;
}

// Does `value` hold for every lane: vote.sync.all.
INTERNVL_PTX_FN bool vote_all(bool value) {
  uint32_t r;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.u32 p, %1, 0;\n vote.sync.all.pred q, p, 0xffffffff;\n"
      " selp.u32 %0, 1, 0, q;\n}"
      : "=r"(r)
      : "r"(uint32_t{value}));
  return r != 0;
}

}  // namespace internvl::ptx

#endif
