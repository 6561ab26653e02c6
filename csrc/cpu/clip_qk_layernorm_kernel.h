// clip + QK LayerNorm: one pass over memory per row; a row stays in the first-level cache between
// its three readings.
#pragma once

#include "cpu/pack.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

// NaN passes through, as in torch.clamp.
INTERNVL_INLINE Vec clip_vec(Vec x, float clip) {
  return minimum(broadcast(clip), maximum(broadcast(-clip), x));
}

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

INTERNVL_INLINE Vec load_parameter(const ClipQkLayernormParams& params, const void* p, int64_t d,
                                   int64_t width) {
  switch (params.parameter_dtype) {
    case DType::kBFloat16:
      return load_at<DType::kBFloat16>(p, d, width);
    case DType::kFloat16:
      return load_at<DType::kFloat16>(p, d, width);
    default:
      return load_at<DType::kFloat32>(p, d, width);
  }
}

template <DType kType>
INTERNVL_INLINE Vec load_clipped(const ClipQkLayernormParams& params, const void* x, int64_t d,
                                 int64_t width) {
  const Vec value = load_at<kType>(x, d, width);
  return params.has_clip ? clip_vec(value, params.clip) : value;
}

template <DType kType>
INTERNVL_INLINE void copy_clipped(const ClipQkLayernormParams& params, const void* x, void* out,
                                  int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_at<kType>(out, d, width, load_clipped<kType>(params, x, d, width));
}

template <DType kType>
INTERNVL_INLINE void normalize_row(const ClipQkLayernormParams& params, const void* x,
                                   const void* weight, const void* bias, void* out, int64_t width,
                                   float* statistics) {
  Vec sum{};
  for (int64_t d = 0; d < width; d += kLanes) sum += load_clipped<kType>(params, x, d, width);
  const float mean = horizontal_sum(sum) / static_cast<float>(width);
  Vec squares{};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec centered = keep_inside(load_clipped<kType>(params, x, d, width) - mean, d, width);
    squares += centered * centered;
  }
  const float inverse_std =
      1.0f / __builtin_sqrtf(horizontal_sum(squares) / static_cast<float>(width) + params.eps);
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec y = (load_clipped<kType>(params, x, d, width) - mean) * inverse_std;
    y *= load_parameter(params, weight, d, width);
    if (bias) y += load_parameter(params, bias, d, width);
    store_at<kType>(out, d, width, y);
  }
  statistics[0] = mean;
  statistics[1] = inverse_std;
}

template <DType kType>
void clip_qk_layernorm_rows(const ClipQkLayernormParams& params, int64_t begin, int64_t end) {
  using T = typename Element<kType>::type;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(params.qkv) + r * params.qkv_stride;
    T* q = static_cast<T*>(params.q) + r * params.q_width;
    T* k = static_cast<T*>(params.k) + r * params.k_width;
    T* v = static_cast<T*>(params.v) + r * params.k_width;
    float* statistics = params.statistics + 4 * r;
    for (int s = 0; s < 4; ++s) statistics[s] = 0.0f;
    if (params.q_weight)
      normalize_row<kType>(params, x, params.q_weight, params.q_bias, q, params.q_width,
                           statistics);
    else
      copy_clipped<kType>(params, x, q, params.q_width);
    x += params.q_width;
    if (params.k_weight)
      normalize_row<kType>(params, x, params.k_weight, params.k_bias, k, params.k_width,
                           statistics + 2);
    else
      copy_clipped<kType>(params, x, k, params.k_width);
    copy_clipped<kType>(params, x + params.k_width, v, params.k_width);
  }
}

// Gradient 0 outside the clip (and for NaN), as in torch.clamp.
template <DType kType>
INTERNVL_INLINE void store_clip_gradient(const ClipQkLayernormParams& params, const void* x,
                                         void* out, int64_t d, int64_t width, Vec gradient) {
  if (params.has_clip) {
    const Vec value = load_at<kType>(x, d, width);
    gradient = select((value >= broadcast(-params.clip)) & (value <= broadcast(params.clip)),
                      gradient, Vec{});
  }
  store_at<kType>(out, d, width, gradient);
}

template <DType kType>
INTERNVL_INLINE void copy_gradient(const ClipQkLayernormParams& params, const void* x,
                                   const void* grad, void* out, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_clip_gradient<kType>(params, x, out, d, width, load_at<kType>(grad, d, width));
}

// dx of one normalised row; dweight and dbias (fp32, padded to whole vectors) collect over the rows
// of a chunk.
template <DType kType>
INTERNVL_INLINE void normalize_row_backward(const ClipQkLayernormParams& params, const void* x,
                                            const void* grad, const void* weight,
                                            const float* statistics, void* out, int64_t width,
                                            float* dweight, float* dbias) {
  const float mean = statistics[0];
  const float inverse_std = statistics[1];
  Vec sum{}, dot{};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec dy = load_at<kType>(grad, d, width);
    const Vec normal =
        keep_inside((load_clipped<kType>(params, x, d, width) - mean) * inverse_std, d, width);
    const Vec scaled = dy * load_parameter(params, weight, d, width);
    sum += scaled;
    dot += scaled * normal;
    store(dweight + d, load(dweight + d) + dy * normal);
    store(dbias + d, load(dbias + d) + dy);
  }
  const float mean_grad = horizontal_sum(sum) / static_cast<float>(width);
  const float mean_dot = horizontal_sum(dot) / static_cast<float>(width);
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec normal = (load_clipped<kType>(params, x, d, width) - mean) * inverse_std;
    const Vec scaled = load_at<kType>(grad, d, width) * load_parameter(params, weight, d, width);
    store_clip_gradient<kType>(params, x, out, d, width,
                               (scaled - mean_grad - normal * mean_dot) * inverse_std);
  }
}

// Rows [begin, end); the parameter gradients of these rows are added to four fp32 rows of `sums`:
// dq_weight, dq_bias [q_padded each], dk_weight, dk_bias [k_padded each].
template <DType kType>
void clip_qk_layernorm_backward_rows(const ClipQkLayernormParams& params,
                                     const ClipQkLayernormGrads& grads, int64_t begin, int64_t end,
                                     float* sums) {
  using T = typename Element<kType>::type;
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
      normalize_row_backward<kType>(params, x, dq, params.q_weight, statistics, out, params.q_width,
                                    sums, sums + q_padded);
    else
      copy_gradient<kType>(params, x, dq, out, params.q_width);
    x += params.q_width;
    out += params.q_width;
    if (params.k_weight)
      normalize_row_backward<kType>(params, x, dk, params.k_weight, statistics + 2, out,
                                    params.k_width, sums + 2 * q_padded,
                                    sums + 2 * q_padded + k_padded);
    else
      copy_gradient<kType>(params, x, dk, out, params.k_width);
    copy_gradient<kType>(params, x + params.k_width, dv, out + params.k_width, params.k_width);
  }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
