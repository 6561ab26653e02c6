// Warpgroup matrix products: four neighbouring warps, the first one a multiple of four, multiply
// [64, 16] by [16, N] and accumulate in fp32 registers. `.sync.aligned`: all 128 threads execute
// the same call. The products are asynchronous: they read shared memory (and A's registers) and
// write the accumulators until wgmma_wait_group says otherwise; nobody may touch those meanwhile.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include "cuda/ptx/tensor_map.h"
#include "cuda/ptx/types.cuh"

namespace internvl::ptx {

// Which index of an operand runs along the contiguous elements: k, or its own one (m of A, n of B).
enum class Major : int { kK = 0, kMN = 1 };

// An operand in shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
struct MatrixDescriptor {
  uint64_t bits;
};

// Elements stand in rows of as many bytes as the swizzle spans (16 without one), eight rows to a
// group: row i of a group follows row i - 1. Addresses and offsets are multiples of 16 below 2^18.
//   K-major:  rows run along m or n; `stride` is from group to group of rows; `leading` counts
//             without a swizzle only: from the first 8 to the last 8 elements of k.
//   MN-major: rows run along k. With a swizzle, `leading` is from one row's span of m or n to the
//             next, `stride` from group to group of 8 k. Without, `stride` is from 8 elements of m
//             or n to the next 8, `leading` from group to group of 8 k.
// The groups begin at multiples of 8 rows' bytes; the start address may lie further right in row 0.
INTERNVL_PTX_FN MatrixDescriptor make_descriptor(uint32_t addr, uint32_t leading, uint32_t stride,
                                                 Swizzle swizzle) {
  const uint64_t mode = swizzle == Swizzle::k128  ? 1
                        : swizzle == Swizzle::k64 ? 2
                        : swizzle == Swizzle::k32 ? 3
                                                  : 0;
  return {uint64_t{(addr & 0x3ffffu) >> 4} | uint64_t{(leading & 0x3ffffu) >> 4} << 16 |
          uint64_t{(stride & 0x3ffffu) >> 4} << 32 | mode << 62};
}

// The same layout `bytes` further on: a multiple of 16.
INTERNVL_PTX_FN MatrixDescriptor advance(MatrixDescriptor descriptor, uint32_t bytes) {
  return {descriptor.bits + (bytes >> 4)};
}

// The columns N that wgmma_ss and wgmma_rs offer.
template <int N>
constexpr bool kWgmmaColumns = N == 8 || (N >= 16 && N <= 256 && N % 16 == 0);

}  // namespace internvl::ptx

#if defined(INTERNVL_EMULATOR)

#include "emulator/wgmma.h"

#else

#include "cuda/ptx/wgmma_registers.h"

namespace internvl::ptx {

template <int N>
struct WgmmaShape;

// `steps`: N / 16; r0 to r6: the numbers of the operands after the N / 2 accumulators.
#define INTERNVL_WGMMA_SS(N, steps, type, r0, r1, r2, r3, r4)                                     \
  asm volatile(                                                                                   \
      "{\n .reg .pred p;\n setp.ne.b32 p, %" #r2 ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N    \
      "k16.f32." type "." type " {" INTERNVL_WGMMA_TEXT_##steps                                   \
      "}, %" #r0 ", %" #r1 ", p, 1, 1, %" #r3 ", %" #r4 ";\n}"                                    \
      : INTERNVL_WGMMA_OPERANDS_##steps(d)                                                        \
      : "l"(a.bits), "l"(b.bits), "r"(uint32_t{accumulate}), "n"(kTransposedA), "n"(kTransposedB) \
      : "memory")

#define INTERNVL_WGMMA_RS(N, steps, type, r0, r1, r2, r3, r4, r5, r6)                     \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #r5                                 \
               ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type     \
               " {" INTERNVL_WGMMA_TEXT_##steps "}, {%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 \
                                                "}, %" #r4 ", p, 1, 1, %" #r6 ";\n}"      \
               : INTERNVL_WGMMA_OPERANDS_##steps(d)                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits),                 \
                 "r"(uint32_t{accumulate}), "n"(kTransposedB)                             \
               : "memory")

#define INTERNVL_WGMMA_SHAPE(N, steps, r0, r1, r2, r3, r4, r5, r6)                                \
  template <>                                                                                     \
  struct WgmmaShape<N> {                                                                          \
    template <class T, int kTransposedA, int kTransposedB>                                        \
    INTERNVL_PTX_FN static void ss(float (&d)[N / 2], MatrixDescriptor a, MatrixDescriptor b,     \
                                   bool accumulate) {                                             \
      if constexpr (std::is_same_v<T, Bf16>)                                                      \
        INTERNVL_WGMMA_SS(N, steps, "bf16", r0, r1, r2, r3, r4);                                  \
      else                                                                                        \
        INTERNVL_WGMMA_SS(N, steps, "f16", r0, r1, r2, r3, r4);                                   \
    }                                                                                             \
    template <class T, int kTransposedB>                                                          \
    INTERNVL_PTX_FN static void rs(float (&d)[N / 2], const uint32_t (&a)[4], MatrixDescriptor b, \
                                   bool accumulate) {                                             \
      if constexpr (std::is_same_v<T, Bf16>)                                                      \
        INTERNVL_WGMMA_RS(N, steps, "bf16", r0, r1, r2, r3, r4, r5, r6);                          \
      else                                                                                        \
        INTERNVL_WGMMA_RS(N, steps, "f16", r0, r1, r2, r3, r4, r5, r6);                           \
    }                                                                                             \
  };

INTERNVL_WGMMA_SHAPE(8, 0, 4, 5, 6, 7, 8, 9, 10)
INTERNVL_WGMMA_SHAPE(16, 1, 8, 9, 10, 11, 12, 13, 14)
INTERNVL_WGMMA_SHAPE(32, 2, 16, 17, 18, 19, 20, 21, 22)
INTERNVL_WGMMA_SHAPE(48, 3, 24, 25, 26, 27, 28, 29, 30)
INTERNVL_WGMMA_SHAPE(64, 4, 32, 33, 34, 35, 36, 37, 38)
INTERNVL_WGMMA_SHAPE(80, 5, 40, 41, 42, 43, 44, 45, 46)
INTERNVL_WGMMA_SHAPE(96, 6, 48, 49, 50, 51, 52, 53, 54)
INTERNVL_WGMMA_SHAPE(112, 7, 56, 57, 58, 59, 60, 61, 62)
INTERNVL_WGMMA_SHAPE(128, 8, 64, 65, 66, 67, 68, 69, 70)
INTERNVL_WGMMA_SHAPE(144, 9, 72, 73, 74, 75, 76, 77, 78)
INTERNVL_WGMMA_SHAPE(160, 10, 80, 81, 82, 83, 84, 85, 86)
INTERNVL_WGMMA_SHAPE(176, 11, 88, 89, 90, 91, 92, 93, 94)
INTERNVL_WGMMA_SHAPE(192, 12, 96, 97, 98, 99, 100, 101, 102)
INTERNVL_WGMMA_SHAPE(208, 13, 104, 105, 106, 107, 108, 109, 110)
INTERNVL_WGMMA_SHAPE(224, 14, 112, 113, 114, 115, 116, 117, 118)
INTERNVL_WGMMA_SHAPE(240, 15, 120, 121, 122, 123, 124, 125, 126)
INTERNVL_WGMMA_SHAPE(256, 16, 128, 129, 130, 131, 132, 133, 134)

#undef INTERNVL_WGMMA_SHAPE
#undef INTERNVL_WGMMA_RS
#undef INTERNVL_WGMMA_SS

// d [64, N] = a [64, 16] * b [16, N] (+ d). A thread's d[4 * i + j]: row 16 * warp + lane / 4 + 8 *
// (j / 2), column 8 * i + 2 * (lane % 4) + j % 2, warp and lane within the warpgroup. Give d a
// value (zero) also where nothing accumulates: the assembler drops the store, but it merges
// accumulators that never had one.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int N, Major kA, Major kB>
INTERNVL_PTX_FN void wgmma_ss(float (&d)[N / 2], MatrixDescriptor a, MatrixDescriptor b,
                              bool accumulate) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "wgmma takes Bf16 or Fp16");
  static_assert(kWgmmaColumns<N>, "N is 8 or a multiple of 16 up to 256");
  WgmmaShape<N>::template ss<T, static_cast<int>(kA), static_cast<int>(kB)>(d, a, b, accumulate);
}

// A from registers, as the A operand of mma_m16n8k16: rows 16 * warp and on of the 64.
template <class T, int N, Major kB>
INTERNVL_PTX_FN void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], MatrixDescriptor b,
                              bool accumulate) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "wgmma takes Bf16 or Fp16");
  static_assert(kWgmmaColumns<N>, "N is 8 or a multiple of 16 up to 256");
  WgmmaShape<N>::template rs<T, static_cast<int>(kB)>(d, a, b, accumulate);
}

// Before the first product, and between the threads' own use of registers and a product with them.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
INTERNVL_PTX_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last commit become one group.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-commit-group
INTERNVL_PTX_FN void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most the N youngest groups are under way.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-wait-group
template <int N>
INTERNVL_PTX_FN void wgmma_wait_group() {
  static_assert(N >= 0 && N <= 7, "wgmma_wait_group: N counts groups, at most 7");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving a use of the register across this place: accumulators after a
// wait.
INTERNVL_PTX_FN void fence_operand(float& value) { asm volatile("" : "+f"(value)::"memory"); }
INTERNVL_PTX_FN void fence_operand(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

}  // namespace internvl::ptx

#endif
