// Tiles of the backward. See NOTES.md for the schedule.
#pragma once

#include "cuda/tile/attn_grad.cuh"
#include "cuda/tile/swizzle.cuh"

namespace internvl::sm80 {

using tile::BlockPlace;
using tile::BwdArgs;
using tile::lowest_bit;
using tile::masked_key;
using tile::masked_query;
using tile::MaskedKey;
using tile::MaskedQuery;
using tile::merged_summary;
using tile::place_of_block;
using tile::query_tile;
using tile::ScoreGrad;
using tile::warp_bits;

// kernel_kv: a block owns kBlockN keys of a KV head and walks over tiles of kBlockM query rows.
// kernel_q: a block owns kBlockRows query rows of a head and walks over tiles of kBlockKeys keys.
//
// kRowTiles: 16-row pieces of the owned side per warp; each makes a fragment of the streamed side
// serve one more product. kSplit: warps that share the same owned rows. In kernel_kv they each
// compute the scores of their part of the queries, exchange P and dS, and own a part of the columns
// of dK and dV. In kernel_q they each take a part of the keys; their dQ are added up at the end.
// kStep: columns of a score tile a warp works on at a time.
//
// kSmall: for devices whose blocks have 99 KiB of shared memory (8.6, 8.9, 12.0), where the usual
// tiles do not fit: shorter streamed tiles. Their tensor cores take at least twice the cycles of
// 8.0's per product, so that kernel_q need not share fragments between row tiles.
template <int kHeadDim, bool kSmall = false>
struct BwdTiles;

template <>
struct BwdTiles<64> {
  static constexpr int kBlockM = 64, kBlockN = 128, kRowTiles = 2, kSplit = 1, kStep = 16;
  static constexpr int kBlockRows = 128, kBlockKeys = 64, kQRowTiles = 2, kQSplit = 1, kQStep = 32;
};

template <>
struct BwdTiles<96> {
  static constexpr int kBlockM = 64, kBlockN = 128, kRowTiles = 1, kSplit = 1, kStep = 32;
  static constexpr int kBlockRows = 128, kBlockKeys = 64, kQRowTiles = 2, kQSplit = 2, kQStep = 16;
};

template <>
struct BwdTiles<128> {
  static constexpr int kBlockM = 64, kBlockN = 128, kRowTiles = 1, kSplit = 1, kStep = 16;
  static constexpr int kBlockRows = 128, kBlockKeys = 64, kQRowTiles = 2, kQSplit = 2, kQStep = 16;
};

template <>
struct BwdTiles<128, true> : BwdTiles<128> {
  static constexpr int kBlockM = 32, kBlockKeys = 32, kQRowTiles = 1, kQSplit = 1, kQStep = 32;
};

template <>
struct BwdTiles<256> {
  static constexpr int kBlockM = 32, kBlockN = 64, kRowTiles = 1, kSplit = 2, kStep = 16;
  static constexpr int kBlockRows = 64, kBlockKeys = 32, kQRowTiles = 1, kQSplit = 2, kQStep = 16;
};

template <class T, int kHeadDimValue, bool kSmall = false>
struct BwdTraits : BwdTiles<kHeadDimValue, kSmall> {
  using Element = T;
  using Tiles = BwdTiles<kHeadDimValue, kSmall>;
  using Layout = tile::Swizzle<kHeadDimValue>;
  static constexpr int kHeadDim = kHeadDimValue;
  static constexpr int kPitchBytes = Layout::kPitchBytes;
  static constexpr int kKvThreads = Tiles::kBlockN / (16 * Tiles::kRowTiles) * Tiles::kSplit * 32;
  static constexpr int kQThreads =
      Tiles::kBlockRows / (16 * Tiles::kQRowTiles) * Tiles::kQSplit * 32;
  // Two blocks of 128 threads on a multiprocessor hide each other's barriers.
  static constexpr int kMinBlocks = kKvThreads == 128 ? 2 : 1;
  // Query tiles of kernel_kv and key tiles of kernel_q that make a block's own side of the other.
  static constexpr int kRowParts = Tiles::kBlockRows / Tiles::kBlockM;
  static constexpr int kKeyParts = Tiles::kBlockN / Tiles::kBlockKeys;
  static_assert(Tiles::kBlockM % (Tiles::kStep * Tiles::kSplit) == 0,
                "whole steps in a query tile");
  static_assert(Tiles::kBlockKeys % (Tiles::kQStep * Tiles::kQSplit) == 0,
                "whole steps in a key tile");
  static_assert(kHeadDim / 16 % Tiles::kSplit == 0, "a warp owns whole column tiles of dK and dV");
  static_assert(Tiles::kSplit == 1 || kHeadDim / Tiles::kSplit % 64 == 0,
                "a warp's columns start at a multiple of the swizzle's group");
};

}  // namespace internvl::sm80
