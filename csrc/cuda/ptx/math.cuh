// fp32 functions of the special function unit, and arithmetic whose rounding must not depend on the
// compiler's choice to fuse.
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/math.h"

#else

namespace internvl::ptx {

// 2^x, relative error at most 2^-22; subnormal inputs and results are 0: ex2.approx.ftz.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
INTERNVL_PTX_FN float ex2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// log2(x), absolute error at most 2^-22 in [0.5, 2], relative 2^-22 outside: lg2.approx.ftz.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-lg2
INTERNVL_PTX_FN float lg2(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// 1 / x, at most 1 unit in the last place off: rcp.approx.ftz.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-rcp
INTERNVL_PTX_FN float rcp(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// 1 / sqrt(x), relative error at most 2^-22.9: rsqrt.approx.ftz.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-rsqrt
INTERNVL_PTX_FN float rsqrt(float x) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// a * b + c, rounded once: fma.rn.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-fma
INTERNVL_PTX_FN float fma(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}

// The larger one; of a number and NaN the number: max.f32.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-max
INTERNVL_PTX_FN float fmax(float a, float b) {
  float r;
  asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The smaller one; of a number and NaN the number: min.f32.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-min
INTERNVL_PTX_FN float fmin(float a, float b) {
  float r;
  asm("min.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

}  // namespace internvl::ptx

#endif
