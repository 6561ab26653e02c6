// Which thread holds which part of a row, and the steps that forward and backward share.
//
// A row of `width` elements is cut into vectors of 16 bytes. A team of threads (whole warps) owns a
// row: vector j of thread t is number j * team + t, so that every access of a warp is one run of
// memory. Rows whose width, stride or address is no multiple of 16 bytes take the same way with
// element-wise accesses.
#pragma once

#include <cmath>

#include "common/mask.h"
#include "common/params.h"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/tile/vector.cuh"

namespace internvl::sm80 {

constexpr int kWarp = 32;
constexpr int kMaxTeamWarps = 32;

// How a launch cuts the rows; chosen on the host.
struct NormPlan {
  int team = kWarp;     // threads of a row
  int teams = 1;        // rows a block works on at once; more than 1 only with teams of one warp
  bool aligned = true;  // 16-byte accesses are possible everywhere
  int vectors = 0;      // backward: of a thread, 0: read from memory
  int stages = 2;       // backward: rows of a team in shared memory, the next one included
  int q_workers = 0;    // backward: teams of each part
  int k_workers = 0;
  int v_workers = 0;
  float* sums = nullptr;  // backward: [q_workers][2][q_width], then [k_workers][2][k_width]
};

using tile::kVectorElements;
using tile::load_vector;
using tile::pack_vector;
using tile::store_vector;
using tile::unpack_vector;

template <int kElements, class P>
INTERNVL_PTX_FN void load_parameters_as(float (&w)[kElements], const P* base, int64_t d,
                                        int64_t width, bool aligned) {
  constexpr int kStep = kVectorElements<P> < kElements ? kVectorElements<P> : kElements;
  INTERNVL_UNROLL
  for (int e = 0; e < kElements; e += kStep) {
    float part[kVectorElements<P>];
    unpack_vector<P>(part, load_vector(base, d + e, width, aligned));
    INTERNVL_UNROLL
    for (int i = 0; i < kStep; ++i) w[e + i] = part[i];
  }
}

// Elements [d, d + kElements) of a weight or bias, in fp32 or in the rows' type.
template <class T>
INTERNVL_PTX_FN void load_parameters(float (&w)[kVectorElements<T>], const void* base, DType dtype,
                                     int64_t d, int64_t width, bool aligned) {
  if (dtype == DType::kFloat32)
    load_parameters_as(w, static_cast<const float*>(base), d, width, aligned);
  else
    load_parameters_as(w, static_cast<const T*>(base), d, width, aligned);
}

// NaN passes through, as in torch.clamp.
INTERNVL_PTX_FN float clip_value(float x, const ClipQkLayernormParams& params) {
  if (!params.has_clip) return x;
  return x > params.clip ? params.clip : x < -params.clip ? -params.clip : x;
}

// Sums over the threads of a team, in an order that depends on the team's size alone.
class TeamSum {
 public:
  // `slots`: shared memory of 2 * kMaxTeamWarps floats of the block.
  INTERNVL_PTX_FN TeamSum(uint32_t slots, int team) : slots_(slots), warps_(team / kWarp) {}

  // All threads of the block call it the same number of times when a team has several warps.
  INTERNVL_PTX_FN float operator()(float value) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    value = warp_sum(value);
    if (warps_ == 1) return value;
    // Two sets of slots in turn: whoever writes a set again has met all its readers at the barrier
    // between.
    const uint32_t set = slots_ + 4 * kMaxTeamWarps * turn_;
    turn_ ^= 1;
    if (lane == 0) ptx::st_shared(set + 4 * (threadIdx.x / kWarp), value);
    ptx::sync_threads();
    return warp_sum(lane < warps_ ? ptx::ld_shared<float>(set + 4 * lane) : 0.0f);
  }

 private:
  static INTERNVL_PTX_FN float warp_sum(float value) {
    INTERNVL_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += ptx::shfl_bfly(value, mask);
    return value;
  }

  uint32_t slots_;
  int warps_;
  int turn_ = 0;
};

}  // namespace internvl::sm80
