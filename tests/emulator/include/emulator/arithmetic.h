// Arithmetic of the 16-bit types and of the special function unit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace internvl::emulator {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bf16_to_float(uint16_t bits) { return bits_float(uint32_t{bits} << 16); }

// To nearest even; NaN becomes 0x7fff, as cvt.rn.bf16 has it.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Exact: the exponent is rebased by a multiplication, which also normalises subnormal numbers.
inline float fp16_to_float(uint16_t bits) {
  const float magnitude = bits_float((uint32_t{bits} & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;  // infinity and NaN
  return bits_float(float_bits(magnitude) | special | (uint32_t{bits} & 0x8000u) << 16);
}

// To nearest even, subnormal numbers included; NaN becomes 0x7fff.
inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    const float shifted = bits_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | rounded >> 13);
}

// Results of the .approx.ftz functions: correct, then off by up to the documented error in a
// direction that depends on the argument, so that no kernel relies on more than is promised.
inline float flush_subnormal(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

// -1, 0 or 1.
inline int deviation(float argument) {
  return static_cast<int>((float_bits(argument) * 2654435761u) >> 16) % 3 - 1;
}

inline bool power_of_two(float value) { return (float_bits(value) & 0x007fffffu) == 0; }

inline float ex2_approx(float x) {
  x = flush_subnormal(x);
  const double exact = std::exp2(static_cast<double>(x));
  if (x == std::floor(x) || x != x) return flush_subnormal(static_cast<float>(exact));
  return flush_subnormal(static_cast<float>(exact * (1 + 0x1.6p-23 * deviation(x))));
}

inline float lg2_approx(float x) {
  x = flush_subnormal(x);
  const double exact = std::log2(static_cast<double>(x));
  if (!(x > 0) || std::isinf(x) || power_of_two(x)) return static_cast<float>(exact);
  const double error = 0x1.6p-23 * deviation(x);
  return static_cast<float>(x > 0.5f && x < 2.0f ? exact + error : exact * (1 + error));
}

inline float rcp_approx(float x) {
  x = flush_subnormal(x);
  const float exact = 1.0f / x;
  if (std::isinf(exact) || exact == 0 || exact != exact || power_of_two(x))
    return flush_subnormal(exact);
  return flush_subnormal(bits_float(float_bits(exact) + deviation(x)));
}

inline float rsqrt_approx(float x) {
  x = flush_subnormal(x);
  const double exact = 1.0 / std::sqrt(static_cast<double>(x));
  if (!(x > 0) || std::isinf(x) || power_of_two(x)) return static_cast<float>(exact);
  return static_cast<float>(exact * (1 + 0x1.1p-24 * deviation(x)));
}

// How the fp32 additions of a product are carried out; the documentation leaves both open.
struct MmaOrder {
  int permutation[16];  // of the products of a row and a column
  bool addend_last;     // products first, then c
  bool toward_zero;     // truncate every sum
};

// Fragments of the 32 lanes to d = a * b + c. Products are exact; sums follow `order`.
void mma_m16n8k16(float* const d[32], const uint32_t* const a[32], const uint32_t* const b[32],
                  const float* const c[32], bool is_bf16, const MmaOrder& order);

}  // namespace internvl::emulator
