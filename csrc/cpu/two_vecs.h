// 2 * kLanes neighbouring numbers of a row as two vectors, in the order that costs least: as they
// lie, or for bf16 the even and the odd ones, which a shift and a mask give and take. What is added
// up or stored between rows keeps that order (TwoVecs order) until store_in_order undoes it.
#pragma once

#include "cpu/pack.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr int kTwo = 2 * kLanes;

struct TwoVecs {
  Vec first, second;
};

template <DType kType>
constexpr bool kEvenOdd = kType == DType::kBFloat16;

template <DType kType>
INTERNVL_INLINE TwoVecs load_two(const typename Element<kType>::type* p) {
  if constexpr (kEvenOdd<kType>) {
    const VecU both = as_bits(load(reinterpret_cast<const float*>(p)));
    return {as_float(both << 16), as_float(both & 0xffff0000u)};
  } else {
    return {Element<kType>::load_vec(p), Element<kType>::load_vec(p + kLanes)};
  }
}

// The first `count` < kTwo numbers, zeros above.
template <DType kType>
INTERNVL_INLINE TwoVecs load_two_partial(const typename Element<kType>::type* p, int64_t count) {
  typename Element<kType>::type numbers[kTwo] = {};
  for (int64_t i = 0; i < count; ++i) numbers[i] = p[i];
  return load_two<kType>(numbers);
}

// Numbers that the type holds exactly; NaN stays as it is.
template <DType kType>
INTERNVL_INLINE void store_two_exact(typename Element<kType>::type* p, TwoVecs x) {
  if constexpr (kEvenOdd<kType>) {
    store(reinterpret_cast<float*>(p),
          as_float((as_bits(x.first) >> 16) | (as_bits(x.second) & 0xffff0000u)));
  } else {
    Element<kType>::store_vec(p, x.first);
    Element<kType>::store_vec(p + kLanes, x.second);
  }
}

// Round to nearest even. A NaN must be quiet and its lower 16 bits at most 0x8000, or the rounding
// of bf16 could carry into its sign: true of what arithmetic makes of 16-bit NaN.
template <DType kType>
INTERNVL_INLINE void store_two(typename Element<kType>::type* p, TwoVecs x) {
  if constexpr (kEvenOdd<kType>) {
    const VecU first = as_bits(x.first), second = as_bits(x.second);
    store_two_exact<kType>(p, {as_float(first + (0x7fffu + ((first >> 16) & 1u))),
                               as_float(second + (0x7fffu + ((second >> 16) & 1u)))});
  } else {
    store_two_exact<kType>(p, x);
  }
}

template <DType kType>
INTERNVL_INLINE void store_two_partial(typename Element<kType>::type* p, TwoVecs x, int64_t count) {
  typename Element<kType>::type numbers[kTwo];
  store_two<kType>(numbers, x);
  for (int64_t i = 0; i < count; ++i) p[i] = numbers[i];
}

// Where number i of kTwo stands.
template <DType kType>
INTERNVL_INLINE int place_of(int i) {
  return kEvenOdd<kType> ? i / 2 + i % 2 * kLanes : i;
}

// `count` floats, a multiple of kTwo, as they lie; `out` is other memory.
template <DType kType>
INTERNVL_INLINE void store_in_order(const float* row, int64_t count, float* out) {
  for (int64_t d = 0; d < count; d += kTwo)
    for (int i = 0; i < kTwo; ++i) out[d + i] = row[d + place_of<kType>(i)];
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
