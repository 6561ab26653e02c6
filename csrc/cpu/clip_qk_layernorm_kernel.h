// clip + QK LayerNorm: one pass over memory; what is read twice stays in the first-level cache. A
// few rows at a time go through q, then k, then v, so that parameters stay there too.
#pragma once

#include "cpu/two_vecs.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr int64_t kRowsTogether = 8;

// The bounds of a call in registers: what a kernel stores could change `params` for all the
// compiler knows, which would read them again for every vector. NaN passes through, as in
// torch.clamp.
struct Clip {
  Vec low, high;
  VecI off;  // all ones without a clip

  INTERNVL_INLINE explicit Clip(const ClipQkLayernormParams& params)
      : low(broadcast(params.has_clip ? -params.clip : -__builtin_inff())),
        high(broadcast(params.has_clip ? params.clip : __builtin_inff())),
        off(VecI{} - (params.has_clip ? 0 : 1)) {}

  INTERNVL_INLINE Vec operator()(Vec x) const { return minimum(high, maximum(low, x)); }
  INTERNVL_INLINE TwoVecs operator()(TwoVecs x) const {
    return {(*this)(x.first), (*this)(x.second)};
  }

  // The gradient that reaches x: 0 outside the clip (and for NaN), as in torch.clamp.
  INTERNVL_INLINE Vec gradient(Vec x, Vec g) const {
    return as_float(as_bits(g) & reinterpret_cast<VecU>(((*this)(x) == x) | off));
  }
  INTERNVL_INLINE TwoVecs gradient(TwoVecs x, TwoVecs g) const {
    return {gradient(x.first, g.first), gradient(x.second, g.second)};
  }

  // The same bounds as numbers of the type: clipping to them needs no rounding afterwards, and
  // gives what rounding a clipped number would.
  template <DType kType>
  INTERNVL_INLINE Clip rounded() const {
    Clip result = *this;
    typename Element<kType>::type numbers[kLanes];
    Element<kType>::store_vec(numbers, low);
    result.low = Element<kType>::load_vec(numbers);
    Element<kType>::store_vec(numbers, high);
    result.high = Element<kType>::load_vec(numbers);
    return result;
  }
};

// Calls whole(d) for the numbers of a row kTwo at a time, then rest(d, count) for what is left.
template <class Whole, class Rest>
INTERNVL_INLINE void over_row(int64_t width, const Whole& whole, const Rest& rest) {
  int64_t d = 0;
  for (; d + kTwo <= width; d += kTwo) whole(d);
  if (d < width) rest(d, width - d);
}

// The memory of a part's next row, fetched while this one is computed: the processor's own
// prefetches stop at the end of a page, and a row of a part is about a page.
template <class T>
struct NextRow {
  const T *x, *grad, *out;

  // Of a loop that takes kStep numbers at a time and stands at number d.
  template <int64_t kStep>
  INTERNVL_INLINE static void fetch(const T* row, int64_t d) {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (kStep < kLine && d % kLine != 0) return;
    for (int64_t i = 0; i < kStep; i += kLine) __builtin_prefetch(row + d + i);
  }
};

// Zero where the TwoVecs order holds no number of the row's last `count`.
template <DType kType>
INTERNVL_INLINE TwoVecs keep_inside(TwoVecs x, int64_t count) {
  const VecI lane = lane_index(), end = broadcast(static_cast<int32_t>(count));
  const VecI first = kEvenOdd<kType> ? lane * 2 : lane;
  const VecI second = kEvenOdd<kType> ? lane * 2 + 1 : lane + kLanes;
  return {select(first < end, x.first, Vec{}), select(second < end, x.second, Vec{})};
}

// A parameter as fp32 in the TwoVecs order of the rows, zeros up to whole TwoVecs and where it is
// absent; NaN as store_two needs it.
template <DType kType, DType kParameter>
INTERNVL_INLINE void load_parameter(const void* parameter, int64_t width, float* out) {
  using T = typename Element<kParameter>::type;
  const T* p = static_cast<const T*>(parameter);
  for (int64_t d = 0; d < width; d += kTwo) {
    T numbers[kTwo] = {};
    for (int64_t i = 0; p && i < smallest(kTwo, width - d); ++i)
      numbers[kParameter == kType ? i : place_of<kType>(static_cast<int>(i))] = p[d + i];
    const TwoVecs x = load_two<kParameter>(numbers);
    const Vec nan = broadcast(__builtin_nanf(""));
    store(out + d, select(x.first == x.first, x.first, nan));
    store(out + d + kLanes, select(x.second == x.second, x.second, nan));
  }
}

// --- forward

template <DType kType>
INTERNVL_INLINE void copy_clipped(const Clip& rounded, const typename Element<kType>::type* x,
                                  typename Element<kType>::type* out, int64_t width,
                                  const NextRow<typename Element<kType>::type>& next) {
  over_row(
      width,
      [&](int64_t d) __attribute__((always_inline)) {
        next.template fetch<kTwo>(next.x, d);
        next.template fetch<kTwo>(next.out, d);
        store_two_exact<kType>(out + d, rounded(load_two<kType>(x + d)));
      },
      [&](int64_t d, int64_t count) {
        store_two_partial<kType>(out + d, rounded(load_two_partial<kType>(x + d, count)), count);
      });
}

// `row` is room for the clipped numbers of the row as fp32.
template <DType kType>
INTERNVL_INLINE void normalize_row(const Clip& clip, float eps,
                                   const typename Element<kType>::type* x, const float* weight,
                                   const float* bias, typename Element<kType>::type* out,
                                   int64_t width,
                                   const NextRow<typename Element<kType>::type>& next, float* row,
                                   float* statistics) {
  TwoVecs sum{};
  const auto add = [&](int64_t d, TwoVecs x) __attribute__((always_inline)) {
    x = clip(x);
    store(row + d, x.first);
    store(row + d + kLanes, x.second);
    sum.first += x.first;
    sum.second += x.second;
  };
  over_row(
      width, [&](int64_t d) __attribute__((always_inline)) { add(d, load_two<kType>(x + d)); },
      [&](int64_t d, int64_t count) { add(d, load_two_partial<kType>(x + d, count)); });
  const float mean = horizontal_sum(sum.first + sum.second) / static_cast<float>(width);

  const auto centered = [&](int64_t d) __attribute__((always_inline)) {
    return TwoVecs{load(row + d) - mean, load(row + d + kLanes) - mean};
  };
  TwoVecs squares[2] = {};  // one sum alone would wait for its own additions
  const auto add_squares = [&](TwoVecs c, TwoVecs& total) __attribute__((always_inline)) {
    total.first += c.first * c.first;
    total.second += c.second * c.second;
  };
  int64_t d = 0;
  for (; d + 2 * kTwo <= width; d += 2 * kTwo) {
    add_squares(centered(d), squares[0]);
    add_squares(centered(d + kTwo), squares[1]);
    next.template fetch<2 * kTwo>(next.x, d);
  }
  for (; d < width; d += kTwo) add_squares(keep_inside<kType>(centered(d), width - d), squares[0]);
  const float variance = horizontal_sum((squares[0].first + squares[0].second) +
                                        (squares[1].first + squares[1].second)) /
                         static_cast<float>(width);
  const float inverse_std = 1.0f / __builtin_sqrtf(variance + eps);

  const auto normal = [&](int64_t d) __attribute__((always_inline)) {
    const TwoVecs c = centered(d);
    return TwoVecs{c.first * inverse_std * load(weight + d) + load(bias + d),
                   c.second * inverse_std * load(weight + d + kLanes) + load(bias + d + kLanes)};
  };
  over_row(
      width,
      [&](int64_t d) __attribute__((always_inline)) {
        next.template fetch<kTwo>(next.out, d);
        store_two<kType>(out + d, normal(d));
      },
      [&](int64_t d, int64_t count) { store_two_partial<kType>(out + d, normal(d), count); });
  statistics[0] = mean;
  statistics[1] = inverse_std;
}

// Rows [begin, end); `scratch` holds the four parameters and one row, each padded to whole TwoVecs.
template <DType kType>
void clip_qk_layernorm_rows(const ClipQkLayernormParams& params, int64_t begin, int64_t end,
                            float* scratch) {
  using T = typename Element<kType>::type;
  const Clip clip(params), rounded = clip.rounded<kType>();
  const void* given[4] = {params.q_weight, params.q_bias, params.k_weight, params.k_bias};
  float* parameters[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t width = i < 2 ? params.q_width : params.k_width;
    parameters[i] = scratch;
    if (params.parameter_dtype == kType)
      load_parameter<kType, kType>(given[i], width, scratch);
    else
      load_parameter<kType, DType::kFloat32>(given[i], width, scratch);
    scratch += round_up(width, kTwo);
  }
  const auto part = [&](int64_t r, bool norm, const float* weight, const float* bias,
                        int64_t offset, void* out, int64_t width, float* statistics) {
    const T* x = static_cast<const T*>(params.qkv) + r * params.qkv_stride + offset;
    T* y = static_cast<T*>(out) + r * width;
    const NextRow<T> next = {x + params.qkv_stride, nullptr, y + width};
    if (statistics) statistics[0] = statistics[1] = 0.0f;
    if (norm)
      normalize_row<kType>(clip, params.eps, x, weight, bias, y, width, next, scratch, statistics);
    else
      copy_clipped<kType>(rounded, x, y, width, next);
  };
  for (int64_t r0 = begin; r0 < end; r0 += kRowsTogether) {
    const int64_t r1 = smallest(r0 + kRowsTogether, end);
    for (int64_t r = r0; r < r1; ++r)
      part(r, params.q_weight, parameters[0], parameters[1], 0, params.q, params.q_width,
           params.statistics + 4 * r);
    for (int64_t r = r0; r < r1; ++r)
      part(r, params.k_weight, parameters[2], parameters[3], params.q_width, params.k,
           params.k_width, params.statistics + 4 * r + 2);
    for (int64_t r = r0; r < r1; ++r)
      part(r, false, nullptr, nullptr, params.q_width + params.k_width, params.v, params.k_width,
           nullptr);
  }
}

// --- backward

template <DType kType>
INTERNVL_INLINE void copy_gradient(const Clip& clip, const typename Element<kType>::type* x,
                                   const typename Element<kType>::type* grad,
                                   typename Element<kType>::type* out, int64_t width,
                                   const NextRow<typename Element<kType>::type>& next) {
  over_row(
      width,
      [&](int64_t d) __attribute__((always_inline)) {
        next.template fetch<kTwo>(next.x, d);
        next.template fetch<kTwo>(next.grad, d);
        next.template fetch<kTwo>(next.out, d);
        store_two_exact<kType>(out + d,
                               clip.gradient(load_two<kType>(x + d), load_two<kType>(grad + d)));
      },
      [&](int64_t d, int64_t count) {
        store_two_partial<kType>(out + d,
                                 clip.gradient(load_two_partial<kType>(x + d, count),
                                               load_two_partial<kType>(grad + d, count)),
                                 count);
      });
}

// dx of one normalised row; dweight and dbias (fp32, TwoVecs order) collect over the rows of a
// chunk.
template <DType kType>
INTERNVL_INLINE void normalize_row_backward(const Clip& clip,
                                            const typename Element<kType>::type* x,
                                            const typename Element<kType>::type* grad,
                                            const float* weight, float mean, float inverse_std,
                                            typename Element<kType>::type* out, int64_t width,
                                            const NextRow<typename Element<kType>::type>& next,
                                            float* dweight, float* dbias) {
  TwoVecs sum{}, dot{};
  const auto add = [&](int64_t d, Vec x, Vec dy, Vec& sum, Vec& dot)
                       __attribute__((always_inline)) {
                         const Vec normal = (clip(x) - mean) * inverse_std;
                         const Vec scaled = dy * load(weight + d);
                         sum += scaled;
                         dot += scaled * normal;
                         store(dweight + d, load(dweight + d) + dy * normal);
                         store(dbias + d, load(dbias + d) + dy);
                       };
  const auto add_two = [&](int64_t d, TwoVecs x, TwoVecs dy) __attribute__((always_inline)) {
    add(d, x.first, dy.first, sum.first, dot.first);
    add(d + kLanes, x.second, dy.second, sum.second, dot.second);
  };
  over_row(
      width,
      [&](int64_t d) __attribute__((always_inline)) {
        next.template fetch<kTwo>(next.out, d);
        add_two(d, load_two<kType>(x + d), load_two<kType>(grad + d));
      },
      [&](int64_t d, int64_t count) {
        add_two(d, load_two_partial<kType>(x + d, count), load_two_partial<kType>(grad + d, count));
      });
  const float mean_grad = horizontal_sum(sum.first + sum.second) / static_cast<float>(width);
  const float mean_dot = horizontal_sum(dot.first + dot.second) / static_cast<float>(width);

  const float per_number = mean_dot * inverse_std;  // of a number's distance from the mean
  const auto gradient = [&](Vec x, Vec dy, const float* w) __attribute__((always_inline)) {
    const Vec g = dy * load(w) - mean_grad - (clip(x) - mean) * per_number;
    return clip.gradient(x, g * inverse_std);
  };
  const auto gradients = [&](int64_t d, TwoVecs x, TwoVecs dy) __attribute__((always_inline)) {
    return TwoVecs{gradient(x.first, dy.first, weight + d),
                   gradient(x.second, dy.second, weight + d + kLanes)};
  };
  over_row(
      width,
      [&](int64_t d) __attribute__((always_inline)) {
        next.template fetch<kTwo>(next.x, d);
        next.template fetch<kTwo>(next.grad, d);
        store_two<kType>(out + d, gradients(d, load_two<kType>(x + d), load_two<kType>(grad + d)));
      },
      [&](int64_t d, int64_t count) {
        const TwoVecs rest = gradients(d, load_two_partial<kType>(x + d, count),
                                       load_two_partial<kType>(grad + d, count));
        store_two_partial<kType>(out + d, rest, count);
      });
}

// One part (q, k or v) of the rows, as an operand of the backward.
struct GradientPart {
  const void* grad;  // null: zero
  int64_t grad_stride;
  int64_t offset, width;
  const void* given;    // the norm's weight, null without a norm
  const float* weight;  // as load_parameter left it
  int64_t statistics;   // first of the part's two
  float* sums;          // dweight, then dbias, each padded to whole TwoVecs
};

template <DType kType>
INTERNVL_INLINE void backward_part(const ClipQkLayernormParams& params,
                                   const ClipQkLayernormGrads& grads, const Clip& clip,
                                   const GradientPart& part, const float* zeros, int64_t r) {
  using T = typename Element<kType>::type;
  const T* x = static_cast<const T*>(params.qkv) + r * params.qkv_stride + part.offset;
  const T* grad = part.grad ? static_cast<const T*>(part.grad) + r * part.grad_stride
                            : reinterpret_cast<const T*>(zeros);
  T* out = static_cast<T*>(grads.grad_qkv) + r * params.width() + part.offset;
  const NextRow<T> next = {x + params.qkv_stride, grad + (part.grad ? part.grad_stride : 0),
                           out + params.width()};
  if (!part.given) return copy_gradient<kType>(clip, x, grad, out, part.width, next);
  const float* statistics = params.statistics + 4 * r + part.statistics;
  const float nan = __builtin_nanf("");  // as in load_parameter
  const float mean = statistics[0] == statistics[0] ? statistics[0] : nan;
  const float inverse_std = statistics[1] == statistics[1] ? statistics[1] : nan;
  normalize_row_backward<kType>(clip, x, grad, part.weight, mean, inverse_std, out, part.width,
                                next, part.sums, part.sums + round_up(part.width, kTwo));
}

// Rows [begin, end); the parameter gradients of these rows are left in four fp32 rows of `sums`,
// which holds zeros: dq_weight, dq_bias, dk_weight, dk_bias, each padded to whole TwoVecs.
// `scratch` holds two weights and one row.
template <DType kType>
void clip_qk_layernorm_backward_rows(const ClipQkLayernormParams& params,
                                     const ClipQkLayernormGrads& grads, int64_t begin, int64_t end,
                                     float* sums, float* scratch) {
  const Clip clip(params);
  const int64_t q_width = params.q_width, k_width = params.k_width;
  const int64_t q_padded = round_up(q_width, kTwo), k_padded = round_up(k_width, kTwo);
  float* k_weight = scratch + q_padded;
  float* row = k_weight + k_padded;
  for (int64_t d = 0; d < larger(q_padded, k_padded); d += kLanes) store(row + d, Vec{});
  if (params.parameter_dtype == kType) {
    load_parameter<kType, kType>(params.q_weight, q_width, scratch);
    load_parameter<kType, kType>(params.k_weight, k_width, k_weight);
  } else {
    load_parameter<kType, DType::kFloat32>(params.q_weight, q_width, scratch);
    load_parameter<kType, DType::kFloat32>(params.k_weight, k_width, k_weight);
  }
  const GradientPart parts[3] = {
      {grads.grad_q, grads.grad_q_stride, 0, q_width, params.q_weight, scratch, 0, sums},
      {grads.grad_k, grads.grad_k_stride, q_width, k_width, params.k_weight, k_weight, 2,
       sums + 2 * q_padded},
      {grads.grad_v, grads.grad_v_stride, q_width + k_width, k_width, nullptr, nullptr, 0,
       nullptr}};
  for (int64_t r0 = begin; r0 < end; r0 += kRowsTogether)
    for (const GradientPart& part : parts)
      for (int64_t r = r0; r < smallest(r0 + kRowsTogether, end); ++r)
        backward_part<kType>(params, grads, clip, part, row, r);
  for (int i = 0; i < 4; ++i) {
    const int64_t padded = i < 2 ? q_padded : k_padded;
    store_in_order<kType>(sums, padded, row);
    for (int64_t d = 0; d < padded; d += kLanes) store(sums + d, load(row + d));
    sums += padded;
  }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
