// The mask of one batch row as the kernels see it: which keys must be loaded, which tiles can be
// left out or need no mask arithmetic, and the mask and bias of single scores. All rules are those
// of common/mask.h.
#pragma once

#include "common/mask.h"
#include "common/params.h"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"

namespace internvl::tile {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// What the prepass (key_summary.cuh) found out; null for the compact form without segments.
struct KeySummaries {
  const ptx::U32x4* tiles = nullptr;  // [batch][tile count], see pack_summary
  const uint8_t* used = nullptr;      // [batch][seqlen_k]: some query sees the key
};

// KeyTileSummary in one load: bits 0 to 3 of x are any_valid, all_valid, any_bidirectional,
// all_bidirectional; y and z are segment_lo and segment_hi.
INTERNVL_PTX_FN ptx::U32x4 pack_summary(const KeyTileSummary& s) {
  return {(s.any_valid ? 1u : 0u) | (s.all_valid ? 2u : 0u) | (s.any_bidirectional ? 4u : 0u) |
              (s.all_bidirectional ? 8u : 0u),
          static_cast<uint32_t>(s.segment_lo), static_cast<uint32_t>(s.segment_hi), 0};
}

INTERNVL_PTX_FN KeyTileSummary unpack_summary(const ptx::U32x4& packed) {
  KeyTileSummary s;
  s.any_valid = packed.x & 1;
  s.all_valid = packed.x & 2;
  s.any_bidirectional = packed.x & 4;
  s.all_bidirectional = packed.x & 8;
  s.segment_lo = static_cast<int32_t>(packed.y);
  s.segment_hi = static_cast<int32_t>(packed.z);
  return s;
}

// The mask of a batch row, clamped to the keys that exist.
struct KeyMask {
  int64_t first_position;  // of query row 0
  int32_t prefix_len, start, end;
  int32_t window;
  int32_t seqlen_k;
  int32_t p_first, p_last;  // positions of the first and the last query row, clamped
  const uint8_t* flags;     // [seqlen_k] or null
  const int32_t* segments;  // [seqlen_k] or null
  const uint8_t* used;      // [seqlen_k] or null: see needs_key
  const ptx::U32x4* tiles;  // [tile count] or null
};

INTERNVL_PTX_FN KeyMask key_mask(const PrefixAttnParams& params, const KeySummaries& summaries,
                                 int64_t tile_count, int64_t b) {
  KeyMask mask;
  const int64_t seqlen_k = params.seqlen_k;
  mask.seqlen_k = static_cast<int32_t>(seqlen_k);
  mask.window = static_cast<int32_t>(params.window);
  mask.prefix_len = 0;
  mask.start = 0;
  mask.end = mask.seqlen_k;
  if (params.prefix_len)
    mask.prefix_len = static_cast<int32_t>(
        larger(0, smaller(ptx::ld_global_nc(params.prefix_len + b), seqlen_k)));
  if (params.key_range) {
    mask.start = static_cast<int32_t>(
        smaller(larger(0, ptx::ld_global_nc(params.key_range + 2 * b)), seqlen_k));
    mask.end = static_cast<int32_t>(
        larger(0, smaller(ptx::ld_global_nc(params.key_range + 2 * b + 1), seqlen_k)));
  }
  mask.first_position = params.query_start ? int64_t{ptx::ld_global_nc(params.query_start + b)}
                                           : seqlen_k - params.seqlen_q;
  mask.p_first = clamp_position(mask.first_position, seqlen_k, params.window);
  mask.p_last = clamp_position(query_position(mask.first_position, params.seqlen_q - 1), seqlen_k,
                               params.window);
  mask.flags = params.key_flags ? params.key_flags + b * seqlen_k : nullptr;
  mask.segments = params.segment_ids ? params.segment_ids + b * seqlen_k : nullptr;
  mask.used = summaries.used ? summaries.used + b * seqlen_k : nullptr;
  mask.tiles = summaries.tiles ? summaries.tiles + b * tile_count : nullptr;
  return mask;
}

// Does some query of the batch row see key j? All others are loaded as zeros. Exact.
INTERNVL_PTX_FN bool needs_key(const KeyMask& mask, int32_t j) {
  if (mask.used) return j < mask.seqlen_k && ptx::ld_global_nc(mask.used + j) != 0;
  return visible(valid_in_range(j, mask.start, mask.end), true,
                 bidirectional_in_prefix(j, mask.prefix_len),
                 causal_reaches(mask.p_first, mask.p_last, j, j + 1, mask.window));
}

// Does some query need every key of [j_lo, j_hi)? Exact for the compact form, else false.
INTERNVL_PTX_FN bool needs_all_keys(const KeyMask& mask, int32_t j_lo, int32_t j_hi) {
  if (mask.used || j_lo < mask.start || j_hi > mask.end) return false;
  const int64_t first = larger(j_lo, mask.prefix_len);
  return first >= j_hi ||
         (causal_reaches(mask.p_first, mask.p_last, first, first + 1, mask.window) &&
          causal_reaches(mask.p_first, mask.p_last, j_hi - 1, j_hi, mask.window));
}

// Query rows of a tile: their clamped positions, and the segments they hold.
struct QueryTile {
  int32_t p_lo, p_hi;
  int32_t segment_lo = 0, segment_hi = 0;
  bool any_inside = true;  // some position is an index of segment_ids
  bool all_inside = true;
};

// Class of keys [j_lo, j_hi) for a query tile, whichever form the mask has. `keys` sums them up; it
// does not count without summaries.
INTERNVL_PTX_FN TileClass classify_keys(const KeyMask& mask, const QueryTile& rows,
                                        const KeyTileSummary& keys, int64_t j_lo, int64_t j_hi) {
  TileClass result =
      mask.flags
          ? classify_tile_flags(rows.p_lo, rows.p_hi, j_lo, j_hi, keys.any_valid, keys.all_valid,
                                keys.any_bidirectional, keys.all_bidirectional, mask.window)
          : classify_tile(rows.p_lo, rows.p_hi, j_lo, j_hi, mask.prefix_len, mask.start, mask.end,
                          mask.window);
  if (mask.segments) {
    if (!rows.any_inside) return kTileEmpty;
    result = combine_classes(result, classify_tile_segments(rows.segment_lo, rows.segment_hi,
                                                            keys.segment_lo, keys.segment_hi));
    if (result == kTileFull && !rows.all_inside) result = kTilePartial;
  }
  return result;
}

// Class of a key tile for a query tile.
INTERNVL_PTX_FN TileClass classify(const KeyMask& mask, const QueryTile& rows, int tile,
                                   int block_n) {
  const int64_t j_lo = int64_t{tile} * block_n;
  const int64_t j_hi = smaller(j_lo + block_n, mask.seqlen_k);
  KeyTileSummary keys;
  if (mask.tiles) keys = unpack_summary(ptx::ld_global_nc(mask.tiles + tile));
  return classify_keys(mask, rows, keys, j_lo, j_hi);
}

// The same, and never full where a tile reaches beyond the last key: its scores need the mask.
INTERNVL_PTX_FN TileClass classify_padded(const KeyMask& mask, const QueryTile& rows, int tile,
                                          int block_n) {
  const TileClass result = classify(mask, rows, tile, block_n);
  return result == kTileFull && (tile + 1) * block_n > mask.seqlen_k ? kTilePartial : result;
}

// What one key brings to the mask, read once and used for every query row.
struct Key {
  int32_t j;
  bool valid, bidirectional;
};

// The two forms of a mask as types, so that loops over keys branch on the form once.
struct RangedKeys {
  INTERNVL_PTX_FN static Key at(const KeyMask& mask, int32_t j) {
    return {j, static_cast<bool>(valid_in_range(j, mask.start, mask.end)),
            static_cast<bool>(bidirectional_in_prefix(j, mask.prefix_len))};
  }
};

struct FlaggedKeys {
  INTERNVL_PTX_FN static Key at(const KeyMask& mask, int32_t j) {
    const int flags = j < mask.seqlen_k ? ptx::ld_global_nc(mask.flags + j) : 0;
    return {j, flag_valid(flags), flag_bidirectional(flags)};
  }
};

INTERNVL_PTX_FN Key key_at(const KeyMask& mask, int32_t j) {
  return mask.flags ? FlaggedKeys::at(mask, j) : RangedKeys::at(mask, j);
}

// Is the key visible to a query at the clamped position p, segments aside?
INTERNVL_PTX_FN bool sees(const KeyMask& mask, int32_t p, const Key& key) {
  return visible(key.valid, true, key.bidirectional, causal(p, key.j, mask.window));
}

// The segment of a query row.
struct QuerySegment {
  bool inside = false;  // the row's position is an index of segment_ids
  int32_t id = 0;
};

INTERNVL_PTX_FN QuerySegment query_segment(const KeyMask& mask, int64_t row) {
  const int64_t p = query_position(mask.first_position, row);
  if (!mask.segments || p < 0 || p >= mask.seqlen_k) return {};
  return {true, ptx::ld_global_nc(mask.segments + p)};
}

INTERNVL_PTX_FN int32_t key_segment(const KeyMask& mask, int32_t j) {
  return j < mask.seqlen_k ? ptx::ld_global_nc(mask.segments + j) : 0;
}

INTERNVL_PTX_FN int32_t clamped_position(const KeyMask& mask, int64_t row) {
  return clamp_position(query_position(mask.first_position, row), mask.seqlen_k, mask.window);
}

}  // namespace internvl::tile
