// Sets counters to zero.
#pragma once

#include "cuda/ptx/memory.cuh"

namespace internvl::tile {

constexpr int kZeroThreads = 256;

template <int kThreads>
__global__ void __launch_bounds__(kThreads) zero_words_kernel(uint32_t* words, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) ptx::st_global(words + i, uint32_t{0});
}

}  // namespace internvl::tile
