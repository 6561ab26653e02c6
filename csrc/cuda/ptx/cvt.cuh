// Conversions between fp32 and the 16-bit types, to nearest even.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/cvt.h"

#else

namespace internvl::ptx {

// Two floats rounded and packed, `lo` in the low half: cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32.
template <class T>
INTERNVL_PTX_FN uint32_t pack2(float lo, float hi) {
  uint32_t r;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  } else {
    static_assert(std::is_same_v<T, Fp16>, "pack2 takes Bf16 or Fp16");
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  }
  return r;
}

// One float rounded to 16 bits: cvt.rn.bf16.f32, cvt.rn.f16.f32.
template <class T>
INTERNVL_PTX_FN uint16_t to_bits(float value) {
  uint16_t r;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
  } else {
    static_assert(std::is_same_v<T, Fp16>, "to_bits takes Bf16 or Fp16");
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(value));
  }
  return r;
}

// Exact. bf16 is the upper half of fp32; fp16: cvt.f32.f16.
template <class T>
INTERNVL_PTX_FN float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    static_assert(std::is_same_v<T, Fp16>, "to_float takes Bf16 or Fp16");
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    return r;
  }
}

// Two packed values as floats, x from the low half. Exact.
template <class T>
INTERNVL_PTX_FN F32x2 unpack2(uint32_t pair) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return {to_float<T>(static_cast<uint16_t>(pair)),
            to_float<T>(static_cast<uint16_t>(pair >> 16))};
  }
}

}  // namespace internvl::ptx

#endif
