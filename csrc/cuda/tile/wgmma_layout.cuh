// Where a [rows, columns] tile of 16-bit elements keeps its elements in shared memory, so that a
// bulk tensor copy writes it and wgmma reads it: the columns are split into panels of 64 (or 32, or
// 16), a panel holds its rows one after another, and the swizzle permutes the 16-byte chunks of a
// row. One tensor copy with a box of [panel, rows] fills a panel.
#pragma once

#include "cuda/ptx/wgmma.cuh"

namespace internvl::tile {

constexpr int kSliceK = 16;  // of one wgmma

template <int kRowCount, int kColumnCount,
          int kPanelColumns = kColumnCount % 64 == 0   ? 64
                              : kColumnCount % 32 == 0 ? 32
                                                       : 16>
struct PanelTile {
  static_assert(kPanelColumns == 64 || kPanelColumns == 32 || kPanelColumns == 16,
                "a panel's row is what a swizzle spans: 128, 64 or 32 bytes");
  static_assert(kRowCount % 8 == 0 && kColumnCount % kPanelColumns == 0,
                "whole groups of eight rows, whole panels");
  static constexpr int kRows = kRowCount;
  static constexpr int kColumns = kColumnCount;
  static constexpr int kPanel = kPanelColumns;
  static constexpr int kPanels = kColumns / kPanel;
  static constexpr uint32_t kRowBytes = kPanel * 2;
  static constexpr uint32_t kGroupBytes = 8 * kRowBytes;  // also the alignment of a tile
  static constexpr uint32_t kPanelBytes = kRows * kRowBytes;
  static constexpr uint32_t kBytes = kPanels * kPanelBytes;
  static constexpr ptx::Swizzle kSwizzle = static_cast<ptx::Swizzle>(kRowBytes);

  // Byte offset of an element; chunks of eight columns stay together.
  INTERNVL_PTX_FN static uint32_t offset(int row, int column) {
    const uint32_t linear = static_cast<uint32_t>(row) * kRowBytes + (column % kPanel) * 2;
    const uint32_t key = linear >> 3 & (kRowBytes - 16);  // bits 7 and up, from bit 4 up
    return static_cast<uint32_t>(column / kPanel) * kPanelBytes + (linear ^ key);
  }

  // The operand whose k runs along the columns: rows from `row` on (a multiple of 8) as m or n,
  // columns k to k + 15 (a multiple of 16).
  INTERNVL_PTX_FN static ptx::MatrixDescriptor k_major(uint32_t tile, int row, int k) {
    return ptx::advance(ptx::make_descriptor(tile, 16, kGroupBytes, kSwizzle),
                        static_cast<uint32_t>(k / kPanel) * kPanelBytes +
                            static_cast<uint32_t>(row) * kRowBytes + (k % kPanel) * 2);
  }

  // The operand whose k runs along the rows: rows k to k + 15 (a multiple of 8), columns from
  // `column` on (a multiple of the panel) as m or n.
  INTERNVL_PTX_FN static ptx::MatrixDescriptor mn_major(uint32_t tile, int k, int column) {
    return ptx::advance(ptx::make_descriptor(tile, kPanelBytes, kGroupBytes, kSwizzle),
                        static_cast<uint32_t>(column / kPanel) * kPanelBytes +
                            static_cast<uint32_t>(k) * kRowBytes);
  }
};

}  // namespace internvl::tile
