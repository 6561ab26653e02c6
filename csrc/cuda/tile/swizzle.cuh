// Where a [rows, kHeadDim] tile of 16-bit elements keeps its 16-byte chunks in shared memory: rows
// follow one another without padding, and the chunks of a row are permuted by XOR with the row
// number, so that ldmatrix (8 rows, one chunk column) and row-wise copies (8 neighbouring chunks)
// both touch all 32 banks once.
#pragma once

#include "cuda/ptx/device.cuh"

namespace internvl::tile {

template <int kHeadDim>
struct Swizzle {
  static_assert(kHeadDim % 32 == 0, "a row is whole groups of 4 chunks, so that XOR stays inside");
  static constexpr int kChunks = kHeadDim / 8;               // per row
  static constexpr int kPitchBytes = kHeadDim * 2;           // from row to row
  static constexpr int kGroup = kHeadDim % 64 == 0 ? 8 : 4;  // chunks permuted among themselves

  // Rows of 128-byte multiples repeat their banks every row, rows of 64-byte multiples every
  // second one.
  INTERNVL_PTX_FN static int key(int row) { return kGroup == 8 ? row & 7 : (row >> 1) & 3; }

  // Byte offset of a chunk. The tile starts at a multiple of 128 bytes.
  INTERNVL_PTX_FN static uint32_t offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kPitchBytes + (chunk ^ key(row)) * 16);
  }

  // The address `chunks` chunks to the right of an address at chunk 0 or 1 of its row; even
  // `chunks` only.
  INTERNVL_PTX_FN static uint32_t right(uint32_t addr, int chunks) {
    return (addr ^ static_cast<uint32_t>((chunks & (kGroup - 1)) * 16)) +
           static_cast<uint32_t>((chunks & ~(kGroup - 1)) * 16);
  }

  // Lane offsets for ldmatrix_x4 at row 0, chunk 0; add kPitchBytes * 8n for other rows, right()
  // for other columns.
  //   a(lane): the 16 x 16 A operand of mma_m16n8k16 from row-major memory; with .trans: the B
  //            operands [16 k, 8 n] of two neighbouring n from memory with k along the rows.
  //   b(lane): the B operands of 16 columns n from memory with n along the rows: registers 0, 1 are
  //            the operand of rows 0 to 7, registers 2, 3 that of rows 8 to 15.
  INTERNVL_PTX_FN static uint32_t a(int lane) { return offset(lane & 15, lane >> 4); }
  INTERNVL_PTX_FN static uint32_t b(int lane) {
    return offset((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  }
};

}  // namespace internvl::tile
