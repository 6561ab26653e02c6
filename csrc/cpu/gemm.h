// Register-tiled products C += A * B on packed operands, summed in fp32: the arithmetic of every
// attention kernel.
//
// An element of A and B is 32 bits: one fp32 number or, where the instruction set multiplies them
// (Operand::kPairs), two bf16 numbers that are neighbours along the depth; depths then count pairs.
// B comes in panels: kPanel columns (the last panel of a matrix may be narrower, in whole vectors)
// stored row by row, [k][panel width]. A is read by broadcasts, either row-major a[r * lda + k] or,
// for products with a transposed tile, column-major a[k * lda + r]. A micro-kernel keeps kRows x
// kVectors accumulators in registers: 6 x 2 of 16 registers with AVX2 and SSE/NEON, 12 x 2 of 32
// with AVX-512.
#pragma once

#include "cpu/vec.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kRows = INTERNVL_LANES == 16 ? 12 : 6;

enum class ALayout { kRowMajor, kColumnMajor };
enum class Operand { kFloat, kPairs };

template <Operand kOperand>
struct OperandConstant {
  static constexpr Operand value = kOperand;
};

// The operands of products over inputs of this type.
template <DType kType>
constexpr Operand kOperandOf =
    kType == DType::kBFloat16 && kHasPairs ? Operand::kPairs : Operand::kFloat;

// 32-bit elements that hold `n` numbers.
template <Operand kOperand>
INTERNVL_INLINE int64_t elements(int64_t n) {
  return kOperand == Operand::kPairs ? (n + 1) / 2 : n;
}

template <Operand kOperand>
INTERNVL_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
  if constexpr (kOperand == Operand::kPairs) return dot_pairs(sum, a, b);
  return sum + a * b;
}

// `factor` scales what is stored; for pairs only, where A cannot carry it without another rounding.
template <int kMicroRows, int kMicroVectors, Operand kOperand, ALayout kLayout>
INTERNVL_INLINE void micro_kernel(int64_t depth, const float* a, int64_t lda, const float* b,
                                  float* c, int64_t ldc, bool accumulate, float factor) {
  Vec sums[kMicroRows][kMicroVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kMicroVectors; ++n)
      sums[r][n] = accumulate ? load(c + r * ldc + n * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kMicroVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kMicroVectors; ++n) columns[n] = load(b + (k * kMicroVectors + n) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kMicroRows; ++r) {
      const Vec row = broadcast(kLayout == ALayout::kRowMajor ? a[r * lda + k] : a[k * lda + r]);
#pragma GCC unroll 4
      for (int n = 0; n < kMicroVectors; ++n)
        sums[r][n] = multiply_add<kOperand>(sums[r][n], row, columns[n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kMicroVectors; ++n)
      store(c + r * ldc + n * kLanes,
            kOperand == Operand::kPairs ? sums[r][n] * factor : sums[r][n]);
}

// The last rows of a tile, one size at a time (kMicroRows counts down to 1).
template <int kMicroRows, int kMicroVectors, Operand kOperand, ALayout kLayout>
INTERNVL_INLINE void micro_kernel_tail(int rows, int64_t depth, const float* a, int64_t lda,
                                       const float* b, float* c, int64_t ldc, bool accumulate,
                                       float factor) {
  if constexpr (kMicroRows > 0) {
    if (rows == kMicroRows)
      micro_kernel<kMicroRows, kMicroVectors, kOperand, kLayout>(depth, a, lda, b, c, ldc,
                                                                 accumulate, factor);
    else
      micro_kernel_tail<kMicroRows - 1, kMicroVectors, kOperand, kLayout>(rows, depth, a, lda, b, c,
                                                                          ldc, accumulate, factor);
  }
}

template <int kMicroVectors, Operand kOperand, ALayout kLayout>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t depth, const float* a,
                                              int64_t lda, const float* b, float* c, int64_t ldc,
                                              bool accumulate, float factor) {
  const int64_t row_step = kLayout == ALayout::kRowMajor ? lda : 1;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    micro_kernel<kRows, kMicroVectors, kOperand, kLayout>(depth, a + r * row_step, lda, b,
                                                          c + r * ldc, ldc, accumulate, factor);
  micro_kernel_tail<kRows - 1, kMicroVectors, kOperand, kLayout>(
      static_cast<int>(rows - r), depth, a + r * row_step, lda, b, c + r * ldc, ldc, accumulate,
      factor);
}

// C[rows, columns] (+)= A[rows, depth] * B[depth, columns]; columns a multiple of kLanes;
// panel_depth is the depth the panels were packed with (>= depth), so that a product may stop
// early.
template <Operand kOperand, ALayout kLayout>
INTERNVL_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a,
                              int64_t lda, const float* b_panels, int64_t panel_depth, float* c,
                              int64_t ldc, bool accumulate, float factor = 1.0f) {
  int64_t n = 0;
  for (; n + kPanel <= columns; n += kPanel)
    multiply_panel<kVectors, kOperand, kLayout>(rows, depth, a, lda, b_panels + n * panel_depth,
                                                c + n, ldc, accumulate, factor);
  if (n < columns)
    multiply_panel<1, kOperand, kLayout>(rows, depth, a, lda, b_panels + n * panel_depth, c + n,
                                         ldc, accumulate, factor);
}

// C += A[:, first:depth] * B[first:depth, :] of row-major A and panels packed with `depth`.
template <Operand kOperand>
INTERNVL_INLINE void multiply_from(int64_t rows, int64_t columns, int64_t first, int64_t depth,
                                   const float* a, int64_t lda, const float* b_panels, float* c,
                                   int64_t ldc) {
  for (int64_t n = 0; n < columns; n += kPanel) {
    const float* panel = b_panels + n * depth;
    if (n + kPanel <= columns)
      multiply_panel<kVectors, kOperand, ALayout::kRowMajor>(
          rows, depth - first, a + first, lda, panel + first * kPanel, c + n, ldc, true, 1.0f);
    else
      multiply_panel<1, kOperand, ALayout::kRowMajor>(
          rows, depth - first, a + first, lda, panel + first * kLanes, c + n, ldc, true, 1.0f);
  }
}

INTERNVL_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
INTERNVL_INLINE int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

// Panel width at column n of a matrix with `columns` (a multiple of kLanes).
INTERNVL_INLINE int64_t panel_width(int64_t n, int64_t columns) {
  return smallest(kPanel, columns - n);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
