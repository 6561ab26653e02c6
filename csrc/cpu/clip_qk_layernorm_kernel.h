// clip + QK LayerNorm: one pass over memory per row; a row stays in the first-level cache between
// its three readings.
#pragma once

#include "cpu/pack.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

// The bounds of a call in registers: what a kernel stores could change `params` for all the
// compiler knows, which would read them again for every vector. NaN passes through, as in
// torch.clamp.
struct Clip {
  Vec low, high;

  INTERNVL_INLINE explicit Clip(const ClipQkLayernormParams& params)
      : low(broadcast(params.has_clip ? -params.clip : -__builtin_inff())),
        high(broadcast(params.has_clip ? params.clip : __builtin_inff())) {}

  INTERNVL_INLINE Vec operator()(Vec x) const { return minimum(high, maximum(low, x)); }
};

template <DType kType>
INTERNVL_INLINE Vec load_at(const void* p, int64_t d, int64_t width) {
  return load_row<kType>(static_cast<const typename Element<kType>::type*>(p), d, width);
}

template <DType kType>
INTERNVL_INLINE void store_at(void* p, int64_t d, int64_t width, Vec x) {
  auto* out = static_cast<typename Element<kType>::type*>(p) + d;
  if (d + kLanes <= width)
    Element<kType>::store_vec(out, x);
  else
    store_partial<kType>(out, x, width - d);
}

INTERNVL_INLINE Vec keep_inside(Vec x, int64_t d, int64_t width) {
  return d + kLanes <= width ? x : select(lane_index() < static_cast<int32_t>(width - d), x, Vec{});
}

template <DType kType>
INTERNVL_INLINE void copy_clipped(const Clip& clip, const void* x, void* out, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_at<kType>(out, d, width, clip(load_at<kType>(x, d, width)));
}

// The sum of term(d) over the vectors of a row. Four sums at a time: one alone would wait for the
// latency of its own addition in every step.
template <class Term>
INTERNVL_INLINE float sum_of_row(int64_t width, Term term) {
  constexpr int kSums = 4;
  Vec sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * kLanes <= width; d += kSums * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sums[i] += term(d + i * kLanes);
  for (; d < width; d += kLanes) sums[0] += term(d);
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <DType kType, DType kParameter>
INTERNVL_INLINE void normalize_row(const Clip& clip, float eps, const void* x, const void* weight,
                                   const void* bias, void* out, int64_t width, float* statistics) {
  const auto value = [&](int64_t d) __attribute__((always_inline)) {
    return clip(load_at<kType>(x, d, width));
  };
  const float mean = sum_of_row(width, value) / static_cast<float>(width);
  const float variance = sum_of_row(width,
                                    [&](int64_t d) __attribute__((always_inline)) {
                                      const Vec centered = keep_inside(value(d) - mean, d, width);
                                      return centered * centered;
                                    }) /
                         static_cast<float>(width);
  const float inverse_std = 1.0f / __builtin_sqrtf(variance + eps);
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec y = (value(d) - mean) * inverse_std * load_at<kParameter>(weight, d, width);
    if (bias) y += load_at<kParameter>(bias, d, width);
    store_at<kType>(out, d, width, y);
  }
  statistics[0] = mean;
  statistics[1] = inverse_std;
}

template <DType kType, DType kParameter>
INTERNVL_INLINE void clip_qk_layernorm_rows_of(const ClipQkLayernormParams& params, int64_t begin,
                                               int64_t end) {
  using T = typename Element<kType>::type;
  const Clip clip(params);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(params.qkv) + r * params.qkv_stride;
    T* q = static_cast<T*>(params.q) + r * params.q_width;
    T* k = static_cast<T*>(params.k) + r * params.k_width;
    T* v = static_cast<T*>(params.v) + r * params.k_width;
    float* statistics = params.statistics + 4 * r;
    for (int s = 0; s < 4; ++s) statistics[s] = 0.0f;
    if (params.q_weight)
      normalize_row<kType, kParameter>(clip, params.eps, x, params.q_weight, params.q_bias, q,
                                       params.q_width, statistics);
    else
      copy_clipped<kType>(clip, x, q, params.q_width);
    x += params.q_width;
    if (params.k_weight)
      normalize_row<kType, kParameter>(clip, params.eps, x, params.k_weight, params.k_bias, k,
                                       params.k_width, statistics + 2);
    else
      copy_clipped<kType>(clip, x, k, params.k_width);
    copy_clipped<kType>(clip, x + params.k_width, v, params.k_width);
  }
}

// Parameters are fp32 or of the type of the rows.
template <DType kType>
void clip_qk_layernorm_rows(const ClipQkLayernormParams& params, int64_t begin, int64_t end) {
  if (params.parameter_dtype == kType)
    clip_qk_layernorm_rows_of<kType, kType>(params, begin, end);
  else
    clip_qk_layernorm_rows_of<kType, DType::kFloat32>(params, begin, end);
}

// Gradient 0 outside the clip (and for NaN), as in torch.clamp.
template <DType kType>
INTERNVL_INLINE void store_clip_gradient(const Clip& clip, bool has_clip, const void* x, void* out,
                                         int64_t d, int64_t width, Vec gradient) {
  if (has_clip) {
    const Vec value = load_at<kType>(x, d, width);
    gradient = select((value >= clip.low) & (value <= clip.high), gradient, Vec{});
  }
  store_at<kType>(out, d, width, gradient);
}

template <DType kType>
INTERNVL_INLINE void copy_gradient(const Clip& clip, bool has_clip, const void* x, const void* grad,
                                   void* out, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_clip_gradient<kType>(clip, has_clip, x, out, d, width, load_at<kType>(grad, d, width));
}

// dx of one normalised row; dweight and dbias (fp32, padded to whole vectors) collect over the rows
// of a chunk.
template <DType kType, DType kParameter>
INTERNVL_INLINE void normalize_row_backward(const Clip& clip, bool has_clip, const void* x,
                                            const void* grad, const void* weight,
                                            const float* statistics, void* out, int64_t width,
                                            float* dweight, float* dbias) {
  constexpr int kSums = 2;  // as in sum_of_row; each step also visits dweight and dbias
  const float mean = statistics[0];
  const float inverse_std = statistics[1];
  Vec sum[kSums] = {}, dot[kSums] = {};
  const auto visit = [&](int64_t d, int i) __attribute__((always_inline)) {
    const Vec dy = load_at<kType>(grad, d, width);
    const Vec normal =
        keep_inside((clip(load_at<kType>(x, d, width)) - mean) * inverse_std, d, width);
    const Vec scaled = dy * load_at<kParameter>(weight, d, width);
    sum[i] += scaled;
    dot[i] += scaled * normal;
    store(dweight + d, load(dweight + d) + dy * normal);
    store(dbias + d, load(dbias + d) + dy);
  };
  int64_t d = 0;
  for (; d + kSums * kLanes <= width; d += kSums * kLanes) {
    visit(d, 0);
    visit(d + kLanes, 1);
  }
  for (; d < width; d += kLanes) visit(d, 0);
  const float mean_grad = horizontal_sum(sum[0] + sum[1]) / static_cast<float>(width);
  const float mean_dot = horizontal_sum(dot[0] + dot[1]) / static_cast<float>(width);
  for (d = 0; d < width; d += kLanes) {
    const Vec normal = (clip(load_at<kType>(x, d, width)) - mean) * inverse_std;
    const Vec scaled = load_at<kType>(grad, d, width) * load_at<kParameter>(weight, d, width);
    store_clip_gradient<kType>(clip, has_clip, x, out, d, width,
                               (scaled - mean_grad - normal * mean_dot) * inverse_std);
  }
}

// Rows [begin, end); the parameter gradients of these rows are added to four fp32 rows of `sums`:
// dq_weight, dq_bias [q_padded each], dk_weight, dk_bias [k_padded each].
template <DType kType, DType kParameter>
INTERNVL_INLINE void backward_rows_of(const ClipQkLayernormParams& params,
                                      const ClipQkLayernormGrads& grads, int64_t begin, int64_t end,
                                      float* sums) {
  using T = typename Element<kType>::type;
  const Clip clip(params);
  const bool has_clip = params.has_clip;
  const int64_t q_padded = round_up(params.q_width, kLanes);
  const int64_t k_padded = round_up(params.k_width, kLanes);
  const auto grad_row = [](const void* base, int64_t stride, int64_t r) {
    return base ? static_cast<const T*>(base) + r * stride : nullptr;
  };
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(params.qkv) + r * params.qkv_stride;
    T* out = static_cast<T*>(grads.grad_qkv) + r * params.width();
    const T* dq = grad_row(grads.grad_q, grads.grad_q_stride, r);
    const T* dk = grad_row(grads.grad_k, grads.grad_k_stride, r);
    const T* dv = grad_row(grads.grad_v, grads.grad_v_stride, r);
    const float* statistics = params.statistics + 4 * r;
    if (params.q_weight)
      normalize_row_backward<kType, kParameter>(clip, has_clip, x, dq, params.q_weight, statistics,
                                                out, params.q_width, sums, sums + q_padded);
    else
      copy_gradient<kType>(clip, has_clip, x, dq, out, params.q_width);
    x += params.q_width;
    out += params.q_width;
    if (params.k_weight)
      normalize_row_backward<kType, kParameter>(
          clip, has_clip, x, dk, params.k_weight, statistics + 2, out, params.k_width,
          sums + 2 * q_padded, sums + 2 * q_padded + k_padded);
    else
      copy_gradient<kType>(clip, has_clip, x, dk, out, params.k_width);
    copy_gradient<kType>(clip, has_clip, x + params.k_width, dv, out + params.k_width,
                         params.k_width);
  }
}

template <DType kType>
void clip_qk_layernorm_backward_rows(const ClipQkLayernormParams& params,
                                     const ClipQkLayernormGrads& grads, int64_t begin, int64_t end,
                                     float* sums) {
  if (params.parameter_dtype == kType)
    backward_rows_of<kType, kType>(params, grads, begin, end, sums);
  else
    backward_rows_of<kType, DType::kFloat32>(params, grads, begin, end, sums);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
