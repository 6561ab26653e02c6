// Register-tiled fp32 products C += A * B on packed operands: the arithmetic of every attention
// kernel.
//
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

template <int kMicroRows, int kMicroVectors, ALayout kLayout>
INTERNVL_INLINE void micro_kernel(int64_t depth, const float* a, int64_t lda, const float* b,
                                  float* c, int64_t ldc, bool accumulate) {
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
      for (int n = 0; n < kMicroVectors; ++n) sums[r][n] += row * columns[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kMicroRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kMicroVectors; ++n) store(c + r * ldc + n * kLanes, sums[r][n]);
}

// The last rows of a tile, one size at a time (kMicroRows counts down to 1).
template <int kMicroRows, int kMicroVectors, ALayout kLayout>
INTERNVL_INLINE void micro_kernel_tail(int rows, int64_t depth, const float* a, int64_t lda,
                                       const float* b, float* c, int64_t ldc, bool accumulate) {
  if constexpr (kMicroRows > 0) {
    if (rows == kMicroRows)
      micro_kernel<kMicroRows, kMicroVectors, kLayout>(depth, a, lda, b, c, ldc, accumulate);
    else
      micro_kernel_tail<kMicroRows - 1, kMicroVectors, kLayout>(rows, depth, a, lda, b, c, ldc,
                                                                accumulate);
  }
}

template <int kMicroVectors, ALayout kLayout>
__attribute__((noinline)) void multiply_panel(int64_t rows, int64_t depth, const float* a,
                                              int64_t lda, const float* b, float* c, int64_t ldc,
                                              bool accumulate) {
  const int64_t row_step = kLayout == ALayout::kRowMajor ? lda : 1;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    micro_kernel<kRows, kMicroVectors, kLayout>(depth, a + r * row_step, lda, b, c + r * ldc, ldc,
                                                accumulate);
  micro_kernel_tail<kRows - 1, kMicroVectors, kLayout>(
      static_cast<int>(rows - r), depth, a + r * row_step, lda, b, c + r * ldc, ldc, accumulate);
}

// C[rows, columns] (+)= A[rows, depth] * B[depth, columns]; columns a multiple of kLanes;
// panel_depth is the depth the panels were packed with (>= depth), so that a product may stop
// early.
template <ALayout kLayout>
INTERNVL_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a,
                              int64_t lda, const float* b_panels, int64_t panel_depth, float* c,
                              int64_t ldc, bool accumulate) {
  int64_t n = 0;
  for (; n + kPanel <= columns; n += kPanel)
    multiply_panel<kVectors, kLayout>(rows, depth, a, lda, b_panels + n * panel_depth, c + n, ldc,
                                      accumulate);
  if (n < columns)
    multiply_panel<1, kLayout>(rows, depth, a, lda, b_panels + n * panel_depth, c + n, ldc,
                               accumulate);
}

INTERNVL_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
INTERNVL_INLINE int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

// Panel width at column n of a matrix with `columns` (a multiple of kLanes).
INTERNVL_INLINE int64_t panel_width(int64_t n, int64_t columns) {
  return smallest(kPanel, columns - n);
}

// One source row of `width` elements as fp32, zero up to `padded`; a null row is all zeros.
template <DType kType>
INTERNVL_INLINE Vec load_row(const typename Element<kType>::type* row, int64_t d, int64_t width) {
  if (row == nullptr) return Vec{};
  if (d + kLanes <= width) return Element<kType>::load_vec(row + d);
  return d < width ? load_partial<kType>(row + d, width - d) : Vec{};
}

// Rows of a strided matrix in an arbitrary selection: `row(r)` is the address of row r or null for
// a zero row.

// -> row-major fp32 [rows][padded], times `factor`.
template <DType kType, class Row>
INTERNVL_INLINE void pack_rows(const Row& row, int64_t rows, int64_t width, int64_t padded,
                               float factor, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < padded; d += kLanes)
      store(out + r * padded + d, load_row<kType>(row(r), d, width) * factor);
}

// -> panels over the columns, [panel][rows_padded][panel width]: the B operand of a product whose
// depth is the rows.
template <DType kType, class Row>
INTERNVL_INLINE void pack_column_panels(const Row& row, int64_t rows, int64_t rows_padded,
                                        int64_t width, int64_t padded, float* out) {
  for (int64_t r = 0; r < rows_padded; ++r) {
    const typename Element<kType>::type* source = r < rows ? row(r) : nullptr;
    for (int64_t d = 0; d < padded; d += kLanes) {
      const int64_t panel = d / kPanel * kPanel;
      store(out + panel * rows_padded + r * panel_width(panel, padded) + (d - panel),
            load_row<kType>(source, d, width));
    }
  }
}

// -> panels over the rows, [panel][width][kPanel]: the transposed B operand of a product whose
// depth is the width. rows_padded is a multiple of kPanel.
template <DType kType, class Row>
INTERNVL_INLINE void pack_row_panels(const Row& row, int64_t rows, int64_t rows_padded,
                                     int64_t width, float factor, float* out) {
  for (int64_t r0 = 0; r0 < rows_padded; r0 += kLanes) {
    float* panel = out + r0 / kPanel * kPanel * width + r0 % kPanel;
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool inside = r0 + i < rows;
        block[i] = load_row<kType>(inside ? row(r0 + i) : nullptr, d, width) * factor;
      }
      transpose(block);
      const int64_t depth = smallest(kLanes, width - d);
      for (int64_t i = 0; i < depth; ++i) store(panel + (d + i) * kPanel, block[i]);
    }
  }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
