// Twin of csrc/cuda/ptx/math.cuh.
#pragma once

#include "emulator/arithmetic.h"

namespace internvl::ptx {

inline float ex2(float x) {
  emulator::count_math();
  return emulator::ex2_approx(x);
}

inline float lg2(float x) {
  emulator::count_math();
  return emulator::lg2_approx(x);
}

inline float rcp(float x) {
  emulator::count_math();
  return emulator::rcp_approx(x);
}

inline float rsqrt(float x) {
  emulator::count_math();
  return emulator::rsqrt_approx(x);
}

// A product of two floats is exact in double; the sum is then rounded to double and to float. Where
// double rounding could differ from one rounding, std::fma decides.
inline float fma(float a, float b, float c) {
  const double sum = static_cast<double>(a) * b + c;
  uint64_t bits;
  memcpy(&bits, &sum, sizeof bits);
  if ((bits & 0x1fffffffu) == 0x10000000u || std::fabs(sum) < 0x1p-125) return std::fma(a, b, c);
  return static_cast<float>(sum);
}

inline float fmax(float a, float b) { return a > b || b != b ? a : b; }
inline float fmin(float a, float b) { return a < b || b != b ? a : b; }

}  // namespace internvl::ptx
