// clip + QK LayerNorm, forward: y = (clip(x) - mean) / sqrt(var + eps) * weight + bias of the q and
// k parts of a fused projection, v = clip(x). Meaning: reference.clip_qk_layernorm.
//
// Grid: x = groups of `plan.teams` rows, y = part (0 q, 1 k, 2 v): a block reads its part of a row
// once, keeps it in registers as 16-bit or fp32 words (kVectors vectors of 16 bytes a thread),
// takes mean and variance from there in two passes, and writes it once. Rows longer than a block
// can hold (kWholeRow = false) are read three times; the second and third time from L2. Shared
// memory: 256 bytes for the sums across warps.
#pragma once

#include "cuda/sm80/clip_qk_layernorm_traits.cuh"

namespace internvl::sm80 {

constexpr int kFwdVectors = 4;  // of a thread: 64 bytes in flight
template <class T>
constexpr int kFwdMaxTeam = sizeof(T) == 4 ? 1024 : 512;  // 16384 elements in registers

struct NormFwdShared {
  float sums[2][kMaxTeamWarps];
};

// One part of a row on its way from x to y.
template <class T>
struct NormRow {
  const T* x;
  T* y;
  const void* weight;  // null: no norm
  const void* bias;
  int64_t width;
  float* statistics;  // mean, 1/std; zeros without a norm
};

template <class T>
INTERNVL_PTX_FN NormRow<T> norm_row(const ClipQkLayernormParams& params, int part, int64_t r) {
  const T* x = static_cast<const T*>(params.qkv) + r * params.qkv_stride;
  if (part == 0)
    return {x,
            static_cast<T*>(params.q) + r * params.q_width,
            params.q_weight,
            params.q_bias,
            params.q_width,
            params.statistics + 4 * r};
  x += params.q_width;
  if (part == 1)
    return {x,
            static_cast<T*>(params.k) + r * params.k_width,
            params.k_weight,
            params.k_bias,
            params.k_width,
            params.statistics + 4 * r + 2};
  return {x + params.k_width,
          static_cast<T*>(params.v) + r * params.k_width,
          nullptr,
          nullptr,
          params.k_width,
          nullptr};
}

template <class T>
INTERNVL_PTX_FN void copy_clipped(const ClipQkLayernormParams& params, const NormRow<T>& row,
                                  int lane, int team, bool aligned) {
  constexpr int kElements = kVectorElements<T>;
  const int64_t span = int64_t{team} * kElements;
  for (int64_t d0 = int64_t{lane} * kElements; d0 < row.width; d0 += kFwdVectors * span) {
    ptx::U32x4 raw[kFwdVectors];
    INTERNVL_UNROLL
    for (int j = 0; j < kFwdVectors; ++j)
      raw[j] = load_vector(row.x, d0 + j * span, row.width, aligned);
    INTERNVL_UNROLL
    for (int j = 0; j < kFwdVectors; ++j) {
      if (params.has_clip) {
        float x[kElements];
        unpack_vector<T>(x, raw[j]);
        INTERNVL_UNROLL
        for (int e = 0; e < kElements; ++e) x[e] = clip_value(x[e], params);
        raw[j] = pack_vector<T>(x);
      }
      store_vector(row.y, d0 + j * span, row.width, aligned, raw[j]);
    }
  }
}

// Calls step(d, vector) for the thread's vectors of a row: out of `raw` when it holds the row.
template <class T, bool kWholeRow, class Step>
INTERNVL_PTX_FN void for_each_vector(const NormRow<T>& row, int64_t first, int64_t span,
                                     bool aligned, ptx::U32x4 (&raw)[kFwdVectors], Step step) {
  if constexpr (kWholeRow) {
    INTERNVL_UNROLL
    for (int j = 0; j < kFwdVectors; ++j) step(first + j * span, raw[j]);
  } else {
    for (int64_t d0 = first; d0 < row.width; d0 += kFwdVectors * span) {
      INTERNVL_UNROLL
      for (int j = 0; j < kFwdVectors; ++j)
        raw[j] = load_vector(row.x, d0 + j * span, row.width, aligned);
      INTERNVL_UNROLL
      for (int j = 0; j < kFwdVectors; ++j) step(d0 + j * span, raw[j]);
    }
  }
}

template <class T, bool kWholeRow>
INTERNVL_PTX_FN void normalize_row(const ClipQkLayernormParams& params, const NormRow<T>& row,
                                   bool present, int lane, int team, bool aligned, TeamSum& sum) {
  constexpr int kElements = kVectorElements<T>;
  const int64_t first = int64_t{lane} * kElements;
  const int64_t span = int64_t{team} * kElements;
  const int64_t width = row.width;
  const float scale = 1.0f / static_cast<float>(width);
  ptx::U32x4 raw[kFwdVectors];
  if constexpr (kWholeRow) {
    INTERNVL_UNROLL
    for (int j = 0; j < kFwdVectors; ++j)
      raw[j] = load_vector(row.x, first + j * span, width, aligned);
  }
  float total = 0.0f;
  for_each_vector<T, kWholeRow>(row, first, span, aligned, raw,
                                [&](int64_t, const ptx::U32x4& vector) {
                                  float x[kElements];
                                  unpack_vector<T>(x, vector);  // zeros beyond the width
                                  INTERNVL_UNROLL
                                  for (int e = 0; e < kElements; ++e)
                                    total += clip_value(x[e], params);
                                });
  const float mean = sum(total) * scale;
  float squares = 0.0f;
  for_each_vector<T, kWholeRow>(
      row, first, span, aligned, raw, [&](int64_t d, const ptx::U32x4& vector) {
        float x[kElements];
        unpack_vector<T>(x, vector);
        INTERNVL_UNROLL
        for (int e = 0; e < kElements; ++e) {
          const float centred = d + e < width ? clip_value(x[e], params) - mean : 0.0f;
          squares = ptx::fma(centred, centred, squares);
        }
      });
  const float inverse_std = 1.0f / sqrtf(sum(squares) * scale + params.eps);
  if (!present) return;
  for_each_vector<T, kWholeRow>(
      row, first, span, aligned, raw, [&](int64_t d, const ptx::U32x4& vector) {
        float x[kElements], w[kElements], b[kElements] = {};
        unpack_vector<T>(x, vector);
        load_parameters<T>(w, row.weight, params.parameter_dtype, d, width, aligned);
        if (row.bias) load_parameters<T>(b, row.bias, params.parameter_dtype, d, width, aligned);
        INTERNVL_UNROLL
        for (int e = 0; e < kElements; ++e)
          x[e] = ptx::fma((clip_value(x[e], params) - mean) * inverse_std, w[e], b[e]);
        store_vector(row.y, d, width, aligned, pack_vector<T>(x));
      });
  if (lane == 0)
    ptx::st_global(reinterpret_cast<ptx::F32x2*>(row.statistics), ptx::F32x2{mean, inverse_std});
}

template <class T, bool kWholeRow, bool kAligned>
__global__ __launch_bounds__(kFwdMaxTeam<T>) void clip_qk_layernorm_fwd_kernel(
    const ClipQkLayernormParams params, const NormPlan plan) {
  const int part = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % plan.team;
  const int64_t r = int64_t{blockIdx.x} * plan.teams + threadIdx.x / plan.team;
  const bool present = r < params.rows;
  // A team without a row repeats the last one and writes nothing.
  const NormRow<T> row = norm_row<T>(params, part, present ? r : params.rows - 1);
  if (row.weight) {
    TeamSum sum(ptx::dynamic_shared(), plan.team);
    normalize_row<T, kWholeRow>(params, row, present, lane, plan.team, kAligned, sum);
  } else if (present) {
    copy_clipped(params, row, lane, plan.team, kAligned);
    if (lane == 0 && row.statistics)
      ptx::st_global(reinterpret_cast<ptx::F32x2*>(row.statistics), ptx::F32x2{0.0f, 0.0f});
  }
}

}  // namespace internvl::sm80
