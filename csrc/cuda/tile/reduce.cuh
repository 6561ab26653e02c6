// Small reductions over the threads of a team, through one shared word per warp.
#pragma once

#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/tile/team.cuh"

namespace internvl::tile {

template <class T>
INTERNVL_PTX_FN T warp_min(T x) {
  INTERNVL_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const T other = ptx::shfl_bfly(x, lanes);
    x = other < x ? other : x;
  }
  return x;
}

// The smallest value of the team. `words` (one per warp) may be used again at once.
template <class Team, class T>
INTERNVL_PTX_FN T team_min(T x, uint32_t words) {
  static_assert(sizeof(T) == 4, "one word per warp");
  x = warp_min(x);
  if (Team::thread() % 32 == 0) ptx::st_shared(words + Team::thread() / 32 * 4, x);
  Team::sync();
  INTERNVL_UNROLL
  for (int warp = 0; warp < Team::kWarps; ++warp) {
    const T other = ptx::ld_shared<T>(words + warp * 4);
    x = other < x ? other : x;
  }
  Team::sync();
  return x;
}

// How many threads before this one keep something, and how many of the team.
struct Place {
  int index, count;
};

// `words` may be used again after the next barrier.
template <class Team>
INTERNVL_PTX_FN Place team_place(bool keeps, uint32_t words) {
  const int lane = Team::thread() % 32, own_warp = Team::thread() / 32;
  int upto = keeps;  // becomes the number of keeping lanes up to this one
  INTERNVL_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int before = ptx::shfl_idx(upto, (lane - lanes) & 31);
    if (lane >= lanes) upto += before;
  }
  if (lane == 31) ptx::st_shared(words + own_warp * 4, upto);
  Team::sync();
  Place place{upto - keeps, 0};
  INTERNVL_UNROLL
  for (int warp = 0; warp < Team::kWarps; ++warp) {
    const int kept = ptx::ld_shared<int>(words + warp * 4);
    if (warp < own_warp) place.index += kept;
    place.count += kept;
  }
  return place;
}

// Sum of the squares of 8 elements.
template <class T>
INTERNVL_PTX_FN float chunk_squares(const ptx::U32x4& chunk) {
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  float sum = 0.0f;
  INTERNVL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const ptx::F32x2 x = ptx::unpack2<T>(pairs[i]);
    sum = ptx::fma(x.x, x.x, ptx::fma(x.y, x.y, sum));
  }
  return sum;
}

}  // namespace internvl::tile
