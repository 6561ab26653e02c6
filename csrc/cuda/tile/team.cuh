// Threads that work on something together: a whole block, or those from `kFirst` on, who meet in a
// named barrier of their own while the others do something else.
#pragma once

#include "cuda/ptx/sync.cuh"

namespace internvl::tile {

template <int kThreadCount, int kFirst = 0, int kBarrier = 0>
struct Team : ptx::FixedBarrier<kBarrier, kThreadCount> {
  static_assert(kThreadCount % 32 == 0 && kFirst % 32 == 0, "whole warps");
  static constexpr int kThreads = kThreadCount;
  static constexpr int kWarps = kThreads / 32;

  INTERNVL_PTX_FN static int thread() { return static_cast<int>(threadIdx.x) - kFirst; }
};

}  // namespace internvl::tile
