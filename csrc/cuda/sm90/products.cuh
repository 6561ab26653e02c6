// Products of tiles by wgmma, and the registers that go in and out of them: of a warpgroup, whose
// accumulators have 64 rows.
#pragma once

#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/wgmma_layout.cuh"

namespace internvl::sm90 {

// Around the products that read or write them: the compiler leaves them where they are.
template <class R, int kCount>
INTERNVL_PTX_FN void fence_registers(R (&registers)[kCount]) {
  INTERNVL_UNROLL
  for (int i = 0; i < kCount; ++i) ptx::fence_operand(registers[i]);
}

template <int kSlices>
INTERNVL_PTX_FN void fence_registers(uint32_t (&a)[kSlices][4]) {
  INTERNVL_UNROLL
  for (int slice = 0; slice < kSlices; ++slice) fence_registers(a[slice]);
}

// c [64, B::kRows] = A B^T over all columns, A's rows from `row` on. One batch, not committed.
template <class T, class A, class B>
INTERNVL_PTX_FN void multiply_rows(float (&c)[B::kRows / 2], uint32_t a, int row, uint32_t b) {
  static_assert(A::kColumns == B::kColumns, "the product runs over the columns of both");
  INTERNVL_UNROLL
  for (int k = 0; k < A::kColumns; k += tile::kSliceK)
    ptx::wgmma_ss<T, B::kRows, ptx::Major::kK, ptx::Major::kK>(c, A::k_major(a, row, k),
                                                               B::k_major(b, 0, k), k != 0);
}

// c [64, B::kColumns] += A B, A [64, B::kRows] in registers. One batch, not committed.
template <class T, class B>
INTERNVL_PTX_FN void multiply_columns(float (&c)[B::kColumns / 2],
                                      const uint32_t (&a)[B::kRows / tile::kSliceK][4],
                                      uint32_t b) {
  INTERNVL_UNROLL
  for (int slice = 0; slice < B::kRows / tile::kSliceK; ++slice)
    ptx::wgmma_rs<T, B::kColumns, ptx::Major::kMN>(c, a[slice],
                                                   B::mn_major(b, slice * tile::kSliceK, 0), true);
}

// Accumulators [64, 16 kSlices] as the A operands of the next product.
template <class T, int kSlices>
INTERNVL_PTX_FN void to_operands(uint32_t (&a)[kSlices][4], const float (&c)[kSlices * 8]) {
  INTERNVL_UNROLL
  for (int slice = 0; slice < kSlices; ++slice) INTERNVL_UNROLL
  for (int i = 0; i < 4; ++i)
    a[slice][i] = ptx::pack2<T>(c[slice * 8 + 2 * i], c[slice * 8 + 2 * i + 1]);
}

}  // namespace internvl::sm90
