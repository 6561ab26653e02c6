// Twin of csrc/cuda/ptx/cvt.cuh.
#pragma once

#include "emulator/arithmetic.h"

namespace internvl::ptx {

template <class T>
inline uint16_t to_bits(float value) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "to_bits takes Bf16 or Fp16");
  return std::is_same_v<T, Bf16> ? emulator::float_to_bf16(value) : emulator::float_to_fp16(value);
}

template <class T>
inline float to_float(uint16_t bits) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "to_float takes Bf16 or Fp16");
  return std::is_same_v<T, Bf16> ? emulator::bf16_to_float(bits) : emulator::fp16_to_float(bits);
}

template <class T>
inline uint32_t pack2(float lo, float hi) {
  return uint32_t{to_bits<T>(lo)} | uint32_t{to_bits<T>(hi)} << 16;
}

template <class T>
inline F32x2 unpack2(uint32_t pair) {
  return {to_float<T>(static_cast<uint16_t>(pair)), to_float<T>(static_cast<uint16_t>(pair >> 16))};
}

}  // namespace internvl::ptx
