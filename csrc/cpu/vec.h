// The lane type of the CPU kernels: a compiler vector of INTERNVL_LANES floats.
//
// Arithmetic uses the operators of GCC and Clang vector types, so one source serves every
// instruction set; the few operations that compilers lower badly have an intrinsic form where the
// target offers one. Everything here is always_inline and lives in the namespace of the including
// isa_*.cpp: a function compiled for AVX-512 must never be picked by the linker for an older
// processor. For the same reason kernels use no templates of the standard library.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
// GCC's own AVX-512 header trips its uninitialised-value warnings (GCC bug 105593).
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/params.h"

#define INTERNVL_INLINE __attribute__((always_inline)) inline

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr int kLanes = INTERNVL_LANES;

typedef float Vec __attribute__((vector_size(4 * INTERNVL_LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * INTERNVL_LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * INTERNVL_LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * INTERNVL_LANES)));
typedef float VecUnaligned __attribute__((vector_size(4 * INTERNVL_LANES), aligned(4), may_alias));
typedef int32_t VecIUnaligned
    __attribute__((vector_size(4 * INTERNVL_LANES), aligned(4), may_alias));
typedef uint16_t VecHUnaligned
    __attribute__((vector_size(2 * INTERNVL_LANES), aligned(2), may_alias));

INTERNVL_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
INTERNVL_INLINE VecI load(const int32_t* p) { return *reinterpret_cast<const VecIUnaligned*>(p); }
INTERNVL_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecUnaligned*>(p) = x; }

INTERNVL_INLINE Vec broadcast(float x) {
#if defined(__AVX512F__) && INTERNVL_LANES == 16
  return _mm512_set1_ps(x);
#elif defined(__AVX__) && INTERNVL_LANES == 8
  return _mm256_set1_ps(x);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}

INTERNVL_INLINE VecI broadcast(int32_t x) { return VecI{} + x; }

INTERNVL_INLINE VecI lane_index() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

INTERNVL_INLINE Vec to_float(VecI x) { return __builtin_convertvector(x, Vec); }
INTERNVL_INLINE Vec as_float(VecU x) { return reinterpret_cast<Vec>(x); }
INTERNVL_INLINE VecU as_bits(Vec x) { return reinterpret_cast<VecU>(x); }
INTERNVL_INLINE Vec absolute(Vec x) { return as_float(as_bits(x) & 0x7fffffffu); }
INTERNVL_INLINE Vec select(VecI mask, Vec a, Vec b) { return mask ? a : b; }

// b wins when either side is NaN, on every target.
INTERNVL_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__) && INTERNVL_LANES == 16
  return _mm512_max_ps(a, b);
#elif defined(__AVX__) && INTERNVL_LANES == 8
  return _mm256_max_ps(a, b);
#elif defined(__SSE__) && INTERNVL_LANES == 4
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

INTERNVL_INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__) && INTERNVL_LANES == 16
  return _mm512_min_ps(a, b);
#elif defined(__AVX__) && INTERNVL_LANES == 8
  return _mm256_min_ps(a, b);
#elif defined(__SSE__) && INTERNVL_LANES == 4
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Lanes of a and b by constant index; b's lanes count from kLanes. Clang and GCC spell it
// differently (GCC has Clang's name from 12 on).
#if defined(__clang__)
#define INTERNVL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERNVL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif

// Lane i of the result is lane i ^ kDistance.
template <int kDistance, int... kLane>
INTERNVL_INLINE Vec swap_lanes(Vec v, __attribute__((unused)) const int (*)[sizeof...(kLane)]) {
  return INTERNVL_SHUFFLE(v, v, (kLane ^ kDistance)...);
}

template <int kDistance>
INTERNVL_INLINE Vec swap_lanes(Vec v) {
#if INTERNVL_LANES == 4
  return swap_lanes<kDistance, 0, 1, 2, 3>(v, nullptr);
#elif INTERNVL_LANES == 8
  return swap_lanes<kDistance, 0, 1, 2, 3, 4, 5, 6, 7>(v, nullptr);
#else
  return swap_lanes<kDistance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(v, nullptr);
#endif
}

INTERNVL_INLINE float horizontal_max(Vec v) {
#if INTERNVL_LANES >= 16
  v = maximum(v, swap_lanes<8>(v));
#endif
#if INTERNVL_LANES >= 8
  v = maximum(v, swap_lanes<4>(v));
#endif
  v = maximum(v, swap_lanes<2>(v));
  v = maximum(v, swap_lanes<1>(v));
  return v[0];
}

INTERNVL_INLINE float horizontal_sum(Vec v) {
#if INTERNVL_LANES >= 16
  v += swap_lanes<8>(v);
#endif
#if INTERNVL_LANES >= 8
  v += swap_lanes<4>(v);
#endif
  v += swap_lanes<2>(v);
  v += swap_lanes<1>(v);
  return v[0];
}

// 2^x for x <= 128. Degree-5 minimax on [-1/2, 1/2], relative error 9.2e-8 before rounding; exactly
// 0 from -127 down, so that masked scores of -inf vanish; NaN stays NaN. The rounding trick leaves
// round(x) in the low bits of `shifted`.
INTERNVL_INLINE Vec exp2(Vec x) {
  const Vec clamped = maximum(broadcast(-127.0f), x);
  const Vec shifted = clamped + 12582912.0f;
  const Vec f = clamped - (shifted - 12582912.0f);
  Vec poly = broadcast(1.3264727e-3f);
  poly = poly * f + 9.671513e-3f;
  poly = poly * f + 5.5507336e-2f;
  poly = poly * f + 2.4022242e-1f;
  poly = poly * f + 6.93147e-1f;
  poly = poly * f + 1.0f;
  return poly * as_float((as_bits(shifted) << 23) + (127u << 23));
}

// --- 16-bit formats
// -------------------------------------------------------------------------------------------

// GCC 12 widens and narrows lanes in halves, with six instructions where one or two do.
INTERNVL_INLINE VecU widen(VecH h) {
#if defined(__AVX512F__) && INTERNVL_LANES == 16
  return reinterpret_cast<VecU>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__) && INTERNVL_LANES == 8
  return reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, VecU);
#endif
}

// Of numbers below 2^16.
INTERNVL_INLINE VecH narrow(VecU x) {
#if defined(__AVX512F__) && INTERNVL_LANES == 16
  return reinterpret_cast<VecH>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__) && INTERNVL_LANES == 8
  const __m256i wide = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<VecH>(
      _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(x, VecH);
#endif
}

INTERNVL_INLINE Vec bfloat16_to_float(VecH h) { return as_float(widen(h) << 16); }

// The upper 16 bits round to nearest even; NaN becomes a quiet NaN.
INTERNVL_INLINE VecU rounded_to_bfloat16(Vec x) {
  const VecU bits = as_bits(x);
  const VecU rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  const VecI is_nan = x != x;
  return is_nan ? (bits | 0x400000u) : rounded;
}

INTERNVL_INLINE VecH float_to_bfloat16(Vec x) { return narrow(rounded_to_bfloat16(x) >> 16); }

INTERNVL_INLINE Vec float16_to_float(VecH h) {
#if defined(__AVX512F__) && INTERNVL_LANES == 16
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif defined(__F16C__) && INTERNVL_LANES == 8
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  const VecU bits = widen(h);
  const VecU magnitude = (bits & 0x7fffu) << 13;
  const Vec scaled =
      as_float(magnitude) * 5.192296858534828e33f;  // 2^112 moves the exponent bias, subnormals too
  const VecI special = magnitude >= (0x7c00u << 13);
  const VecU result = special ? (magnitude | 0x7f800000u) : as_bits(scaled);
  return as_float(result | ((bits & 0x8000u) << 16));
#endif
}

// Round to nearest even, overflow to infinity, subnormals kept; NaN becomes a quiet NaN.
INTERNVL_INLINE VecH float_to_float16(Vec x) {
#if defined(__AVX512F__) && INTERNVL_LANES == 16
  return reinterpret_cast<VecH>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && INTERNVL_LANES == 8
  return reinterpret_cast<VecH>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecU sign = (as_bits(x) >> 16) & 0x8000u;
  const VecU bits = as_bits(x) & 0x7fffffffu;
  const VecU normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const VecU subnormal =
      as_bits(as_float(bits) + 0.5f) - (126u << 23);  // adding 1/2 rounds at half's last place
  VecU result = bits < (113u << 23) ? subnormal : normal;
  result = bits >= 0x477ff000u ? (VecU{} + 0x7c00u) : result;
  result = bits > 0x7f800000u ? (VecU{} + 0x7e00u) : result;
  return narrow(result | sign);
#endif
}

// --- pairs of bf16: 32 bits hold two neighbours along the depth of a product, the first one below

#if defined(INTERNVL_BF16_PAIRS)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

INTERNVL_INLINE Vec without_subnormals(Vec x) {
  return select((as_bits(x) & 0x7f800000u) == 0, as_float(as_bits(x) & 0x80000000u), x);
}
INTERNVL_INLINE Vec first_of_pairs(Vec x) { return without_subnormals(as_float(as_bits(x) << 16)); }
INTERNVL_INLINE Vec second_of_pairs(Vec x) {
  return without_subnormals(as_float(as_bits(x) & 0xffff0000u));
}

// sum + a.first * b.first + a.second * b.second with the rounding of VDPBF16PS: one FMA for the
// second numbers, then one for the first; subnormals are zero going in and coming out.
INTERNVL_INLINE Vec dot_pairs(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  sum = without_subnormals(sum) + second_of_pairs(a) * second_of_pairs(b);
  return without_subnormals(without_subnormals(sum) + first_of_pairs(a) * first_of_pairs(b));
#endif
}

// Round to nearest even as an operand of dot_pairs, which reads subnormals as zero.
INTERNVL_INLINE VecH round_to_pairs(Vec x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<VecH>(_mm512_cvtneps_pbh(x));
#else
  return float_to_bfloat16(x);
#endif
}

// Two vectors as the first and the second numbers of kLanes pairs.
INTERNVL_INLINE Vec make_pairs(VecH first, VecH second) {
  return as_float(widen(first) | (widen(second) << 16));
}

// --- element types
// --------------------------------------------------------------------------------------------

template <DType kType>
struct Element;

template <>
struct Element<DType::kFloat32> {
  using type = float;
  static INTERNVL_INLINE Vec load_vec(const float* p) { return load(p); }
  static INTERNVL_INLINE void store_vec(float* p, Vec x) { store(p, x); }
};

template <>
struct Element<DType::kBFloat16> {
  using type = uint16_t;
  static INTERNVL_INLINE Vec load_vec(const uint16_t* p) {
    return bfloat16_to_float(*reinterpret_cast<const VecHUnaligned*>(p));
  }
  static INTERNVL_INLINE void store_vec(uint16_t* p, Vec x) {
    *reinterpret_cast<VecHUnaligned*>(p) = float_to_bfloat16(x);
  }
};

template <>
struct Element<DType::kFloat16> {
  using type = uint16_t;
  static INTERNVL_INLINE Vec load_vec(const uint16_t* p) {
    return float16_to_float(*reinterpret_cast<const VecHUnaligned*>(p));
  }
  static INTERNVL_INLINE void store_vec(uint16_t* p, Vec x) {
    *reinterpret_cast<VecHUnaligned*>(p) = float_to_float16(x);
  }
};

// The first `count` < kLanes elements, zero above; touches nothing beyond them.
template <DType kType>
INTERNVL_INLINE Vec load_partial(const typename Element<kType>::type* p, int64_t count) {
  typename Element<kType>::type lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Element<kType>::load_vec(lanes);
}

template <DType kType>
INTERNVL_INLINE void store_partial(typename Element<kType>::type* p, Vec x, int64_t count) {
  typename Element<kType>::type lanes[kLanes];
  Element<kType>::store_vec(lanes, x);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// kLanes x kLanes transposition in registers: log2(kLanes) rounds of pairwise interleaving.
template <int kDistance, int... kLane>
INTERNVL_INLINE void interleave(Vec& a, Vec& b,
                                __attribute__((unused)) const int (*)[sizeof...(kLane)]) {
  const Vec low =
      INTERNVL_SHUFFLE(a, b, ((kLane & kDistance) ? kLanes + kLane - kDistance : kLane)...);
  const Vec high =
      INTERNVL_SHUFFLE(a, b, ((kLane & kDistance) ? kLanes + kLane : kLane + kDistance)...);
  a = low;
  b = high;
}

template <int kDistance>
INTERNVL_INLINE void interleave_pair(Vec& a, Vec& b) {
#if INTERNVL_LANES == 4
  interleave<kDistance, 0, 1, 2, 3>(a, b, nullptr);
#elif INTERNVL_LANES == 8
  interleave<kDistance, 0, 1, 2, 3, 4, 5, 6, 7>(a, b, nullptr);
#else
  interleave<kDistance, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b, nullptr);
#endif
}

template <int kDistance>
INTERNVL_INLINE void transpose_round(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & kDistance) == 0) interleave_pair<kDistance>(rows[i], rows[i + kDistance]);
}

INTERNVL_INLINE void transpose(Vec (&rows)[kLanes]) {
  transpose_round<1>(rows);
  transpose_round<2>(rows);
#if INTERNVL_LANES >= 8
  transpose_round<4>(rows);
#endif
#if INTERNVL_LANES >= 16
  transpose_round<8>(rows);
#endif
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
