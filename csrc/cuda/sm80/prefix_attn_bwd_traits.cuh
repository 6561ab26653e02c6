// Tiles of the backward and what its kernels are told. See NOTES.md for the schedule.
#pragma once

#include "common/params.h"
#include "common/prune.h"
#include "cuda/tile/mask_tile.cuh"
#include "cuda/tile/swizzle.cuh"

namespace internvl::sm80 {

// kernel_kv: a block owns kBlockN keys of a KV head and walks over tiles of kBlockM query rows.
// kernel_q: a block owns kBlockRows query rows of a head and walks over tiles of kBlockKeys keys.
//
// kRowTiles: 16-row pieces of the owned side per warp; each makes a fragment of the streamed side
// serve one more product. kSplit: warps that share the same owned rows. In kernel_kv they each
// compute the scores of their part of the queries, exchange P and dS, and own a part of the columns
// of dK and dV. In kernel_q they each take a part of the keys; their dQ are added up at the end.
// kStep: columns of a score tile a warp works on at a time.
template <int kHeadDim>
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
struct BwdTiles<256> {
  static constexpr int kBlockM = 32, kBlockN = 64, kRowTiles = 1, kSplit = 2, kStep = 16;
  static constexpr int kBlockRows = 64, kBlockKeys = 32, kQRowTiles = 1, kQSplit = 2, kQStep = 16;
};

template <class T, int kHeadDimValue>
struct BwdTraits : BwdTiles<kHeadDimValue> {
  using Element = T;
  using Tiles = BwdTiles<kHeadDimValue>;
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

// One call's working memory and sizes, filled on the host (prefix_attn_bwd_launch.cuh).
struct BwdArgs {
  PrefixAttnParams params;
  PrefixAttnGrads grads;
  int64_t group = 1;                   // query heads of a KV head
  tile::KeySummaries keys;             // per tile of kBlockKeys
  int64_t key_tiles = 0;               // tiles of kBlockKeys
  int64_t row_tiles = 0;               // tiles of kBlockM
  int64_t padded_rows = 0;             // seqlen_q rounded up to whole blocks of kBlockRows
  float* lse_log2 = nullptr;           // [batch][heads_q][padded_rows], +inf: no gradient
  float* delta = nullptr;              // likewise: sum dO * O - grad_lse
  ptx::U32x4* row_segments = nullptr;  // [batch][row_tiles]: QueryTile's segments; or null
  ptx::F32x2* row_norms = nullptr;     // [batch][heads_q][row_tiles]: max |q|, min lse; or null
  float* key_norms = nullptr;          // [batch][heads_kv][key_tiles]: max |k|; or null
  float* slope_sums = nullptr;         // [heads_q][batch][blocks of kBlockRows]; or null
  int64_t section_kv = 1;  // (batch, head) pairs whose streamed side shares the L2 cache
  int64_t section_q = 1;
  float scale_log2 = 0.0f;  // softmax_scale * log2(e)
  float prune_threshold = 0.0f;
  bool aligned_out = false, aligned_dq = false, aligned_dk = false, aligned_dv = false;
};

struct BlockPlace {
  int32_t tile, b, h;  // kept through the loops: 32 bits spare registers
};

// Which (tile, head) a block works on. Tiles come in the given order within a section of heads, so
// that the longest come first and the heads at work fit the L2 cache together.
INTERNVL_PTX_FN BlockPlace block_place(int64_t tiles, int64_t batch, int64_t heads,
                                       int64_t section) {
  const int64_t pairs = batch * heads;
  const int64_t index = blockIdx.x;
  const int64_t first = index / (tiles * section) * section;
  const int64_t here = smaller(section, pairs - first);
  const int64_t rest = index - first * tiles;
  const int64_t pair = first + rest % here;
  return {static_cast<int32_t>(rest / here), static_cast<int32_t>(pair / heads),
          static_cast<int32_t>(pair % heads)};
}

// Query rows [first, first + rows) as the mask sees them; rows beyond seqlen_q do not count.
template <int kBlockM, int kParts>
INTERNVL_PTX_FN tile::QueryTile query_tile(const BwdArgs& args, const tile::KeyMask& mask,
                                           int64_t b, int64_t row_tile) {
  tile::QueryTile rows;
  const int64_t first = row_tile * kBlockM;
  const int64_t last = smaller(first + kBlockM * kParts, args.params.seqlen_q) - 1;
  rows.p_lo =
      clamp_position(query_position(mask.first_position, first), mask.seqlen_k, mask.window);
  rows.p_hi = clamp_position(query_position(mask.first_position, last), mask.seqlen_k, mask.window);
  if (!args.row_segments) return rows;
  rows.any_inside = false;
  INTERNVL_UNROLL
  for (int part = 0; part < kParts; ++part) {
    if (row_tile + part >= args.row_tiles) continue;
    const ptx::U32x4 own =
        ptx::ld_global_nc(args.row_segments + b * args.row_tiles + row_tile + part);
    const int32_t lo = static_cast<int32_t>(own.x), hi = static_cast<int32_t>(own.y);
    rows.all_inside = rows.all_inside && own.w != 0;
    if (own.z == 0) continue;
    rows.segment_lo = rows.any_inside && rows.segment_lo < lo ? rows.segment_lo : lo;
    rows.segment_hi = rows.any_inside && rows.segment_hi > hi ? rows.segment_hi : hi;
    rows.any_inside = true;
  }
  return rows;
}

// The summary of kParts neighbouring key tiles.
template <int kParts>
INTERNVL_PTX_FN KeyTileSummary merged_summary(const tile::KeyMask& mask, int64_t first,
                                              int64_t tiles) {
  KeyTileSummary sum;
  if (!mask.tiles) return sum;
  sum = tile::unpack_summary(ptx::ld_global_nc(mask.tiles + first));
  INTERNVL_UNROLL
  for (int part = 1; part < kParts; ++part) {
    if (first + part >= tiles) continue;
    const KeyTileSummary own = tile::unpack_summary(ptx::ld_global_nc(mask.tiles + first + part));
    // Of the valid keys: parts without any do not count.
    sum.all_bidirectional = (sum.all_bidirectional || !sum.any_valid) &&
                            (own.all_bidirectional || !own.any_valid) &&
                            (sum.any_valid || own.any_valid);
    sum.any_valid |= own.any_valid;
    sum.all_valid &= own.all_valid;
    sum.any_bidirectional |= own.any_bidirectional;
    sum.segment_lo = own.segment_lo < sum.segment_lo ? own.segment_lo : sum.segment_lo;
    sum.segment_hi = own.segment_hi > sum.segment_hi ? own.segment_hi : sum.segment_hi;
  }
  return sum;
}

// What a query row, and a key, bring to the mask of single scores.
struct MaskedQuery {
  int32_t p;  // clamped
  tile::QuerySegment segment;
};

struct MaskedKey {
  tile::Key key;
  int32_t segment;
};

INTERNVL_PTX_FN MaskedQuery masked_query(const tile::KeyMask& mask, int64_t row) {
  return {tile::clamped_position(mask, row), tile::query_segment(mask, row)};
}

INTERNVL_PTX_FN MaskedKey masked_key(const tile::KeyMask& mask, int32_t j) {
  return {tile::key_at(mask, j), mask.segments ? tile::key_segment(mask, j) : 0};
}

INTERNVL_PTX_FN bool sees(const tile::KeyMask& mask, const MaskedQuery& query,
                          const MaskedKey& key) {
  const bool same_segment =
      !mask.segments || (query.segment.inside && query.segment.id == key.segment);
  return same_segment && tile::sees(mask, query.p, key.key);
}

}  // namespace internvl::sm80
