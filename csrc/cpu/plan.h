// How one call is cut into tasks: filled by prefix_attn.cpp, read by the kernels. Free of PyTorch
// and of any ISA.
#pragma once

#include <cstdint>

#include "common/mask.h"
#include "common/params.h"
#include "common/prune.h"

namespace internvl::cpu {

constexpr int kMaxBlockN =
    128;  // keys per forward tile: K, V and the score tile stay in the second-level cache

// The mask of one batch row, with the call's data clamped to the keys that exist.
struct KeyMask {
  int64_t prefix_len;
  int64_t start;
  int64_t end;
  int64_t window;
  int64_t seqlen_k;
  int64_t first_position;   // of query row 0
  const uint8_t* flags;     // [seqlen_k] or null
  const int32_t* segments;  // [seqlen_k] or null
};

INTERNVL_MASK_FN KeyMask key_mask(const PrefixAttnParams& params, int64_t b) {
  KeyMask mask;
  const int64_t seqlen_k = params.seqlen_k;
  mask.seqlen_k = seqlen_k;
  mask.window = params.window;
  mask.prefix_len = params.prefix_len ? larger(0, smaller(params.prefix_len[b], seqlen_k)) : 0;
  mask.start = params.key_range ? larger(0, params.key_range[2 * b]) : 0;
  mask.end = params.key_range ? smaller(params.key_range[2 * b + 1], seqlen_k) : seqlen_k;
  mask.first_position = params.query_start ? params.query_start[b] : seqlen_k - params.seqlen_q;
  mask.flags = params.key_flags ? params.key_flags + b * seqlen_k : nullptr;
  mask.segments = params.segment_ids ? params.segment_ids + b * seqlen_k : nullptr;
  return mask;
}

// Segments held by the query rows at positions [p_lo, p_hi].
struct QuerySegments {
  int32_t lo = 0;
  int32_t hi = 0;
  bool any_inside = true;  // some position is an index of segment_ids
  bool all_inside = true;
};

INTERNVL_MASK_FN QuerySegments query_segments(const KeyMask& mask, int64_t p_lo, int64_t p_hi) {
  QuerySegments result;
  if (!mask.segments) return result;
  result.all_inside = p_lo >= 0 && p_hi < mask.seqlen_k;
  const int64_t first = larger(0, p_lo);
  const int64_t last = smaller(mask.seqlen_k - 1, p_hi);
  result.any_inside = first <= last;
  if (!result.any_inside) return result;
  result.lo = result.hi = mask.segments[first];
  for (int64_t p = first + 1; p <= last; ++p) {
    result.lo = mask.segments[p] < result.lo ? mask.segments[p] : result.lo;
    result.hi = mask.segments[p] > result.hi ? mask.segments[p] : result.hi;
  }
  return result;
}

// Class of query positions [p_lo, p_hi] against keys [j_lo, j_hi), whichever form the mask has.
INTERNVL_MASK_FN TileClass classify(const KeyMask& mask, const KeyTileSummary* summary,
                                    const QuerySegments& own, int64_t p_lo, int64_t p_hi,
                                    int64_t j_lo, int64_t j_hi) {
  TileClass tile = mask.flags ? classify_tile_flags(p_lo, p_hi, j_lo, j_hi, summary->any_valid,
                                                    summary->all_valid, summary->any_bidirectional,
                                                    summary->all_bidirectional, mask.window)
                              : classify_tile(p_lo, p_hi, j_lo, j_hi, mask.prefix_len, mask.start,
                                              mask.end, mask.window);
  if (mask.segments) {
    if (!own.any_inside) return kTileEmpty;
    tile = combine_classes(
        tile, classify_tile_segments(own.lo, own.hi, summary->segment_lo, summary->segment_hi));
    if (tile == kTileFull && !own.all_inside) tile = kTilePartial;
  }
  return tile;
}

// Keys of the tile [j_lo, j_hi) that a query at or below p_hi can see all lie below this index.
INTERNVL_MASK_FN int64_t tile_key_end(const KeyMask& mask, const KeyTileSummary* summary,
                                      int64_t p_hi, int64_t j_hi) {
  const int64_t end = smaller(j_hi, mask.seqlen_k);
  if (!mask.flags) return smaller(end, visible_key_end(p_hi, mask.prefix_len, mask.end));
  return summary->any_bidirectional ? end : visible_key_end(p_hi, 0, end);
}

// Queries from position p_lo that see some key from j_lo on all lie at or above p_lo + this many.
INTERNVL_MASK_FN int64_t tile_query_begin(const KeyMask& mask, const KeyTileSummary* summary,
                                          int64_t p_lo, int64_t j_lo) {
  const bool open =
      mask.flags ? summary->any_bidirectional : bidirectional_in_prefix(j_lo, mask.prefix_len);
  return open ? 0 : larger(0, j_lo - p_lo);
}

// Tiles of keys, shared by forward and backward.
struct KeyTiles {
  int64_t block_n = 0;
  int64_t count = 0;
  const KeyTileSummary* summaries =
      nullptr;                    // [batch][count], null for the compact form without segments
  const uint8_t* used = nullptr;  // [batch][seqlen_k]: some query of the batch row sees the key

  const KeyTileSummary* summary(int64_t b, int64_t tile) const {
    return summaries ? summaries + b * count + tile : nullptr;
  }
};

// --- forward
// --------------------------------------------------------------------------------------------------

// A tile of query rows of one (batch, KV head): `heads` query heads from `head0`, rows [row0, row0
// + rows) of each, against key tiles [tile_begin, tile_end). More than one head only when a tile
// holds all rows of each.
struct RowTask {
  int64_t b, head_kv;
  int64_t head0, heads;
  int64_t row0, rows;
  int64_t tile_begin, tile_end;
  int64_t cost;    // visible keys times rows: longest first
  float* partial;  // key split: accumulator, row_max and row_sum instead of out and lse; else null
};

struct FwdPlan {
  PrefixAttnParams params;
  KeyTiles keys;
  int64_t block_m = 0;
  int64_t padded_dim = 0;  // head_dim rounded up to whole vectors
  int64_t splits = 1;
  float* packed_k =
      nullptr;  // [KV head][key tile][k_tile_floats], null: each task packs its own tiles
  float* packed_v = nullptr;
  float* k_norms = nullptr;      // [KV head][key tile] next to packed_k, when pruning
  int64_t packed_head0 = 0;      // KV head 0 of packed_k and packed_v, counted over the whole batch
  float prune_threshold = 0.0f;  // in base 2

  int64_t k_tile_floats() const { return keys.block_n * params.head_dim; }
  int64_t v_tile_floats() const { return keys.block_n * padded_dim; }
  int64_t partial_floats() const { return block_m * (padded_dim + 2); }
  int64_t scratch_floats() const {
    const int64_t rows = block_m * (2 * padded_dim + keys.block_n + 32);
    return rows + 4 * keys.block_n + (packed_k ? 0 : k_tile_floats() + v_tile_floats());
  }
};

// --- decoding: few query rows per KV head, so that reading K and V is most of the work
// ----------------

constexpr int64_t kDecodeRows = 32;  // most query rows per KV head of a decoding call
constexpr int64_t kDotRows = 4;      // up to so many, scores are dot products (decode_kernel.h)
constexpr int64_t kStagedKeys =
    24;  // above, keys converted at a time: a multiple of every ISA's rows

// Every query row of KV heads [head0, head0 + heads) of batch row b against key tiles [tile_begin,
// tile_end).
struct DecodeTask {
  int64_t b, head0, heads;
  int64_t tile_begin, tile_end;
  int64_t parts;   // key splits of these rows, in consecutive tasks
  float* partial;  // [heads * rows][padded_dim + 2] with more than one part, else null
};

struct DecodePlan {
  PrefixAttnParams params;
  KeyTiles keys;
  int64_t padded_dim = 0;
  int64_t rows = 0;  // query rows per KV head: row r is query r % seqlen_q of head r / seqlen_q
  int64_t padded_rows = 0;  // lanes per KV head: 1, 2 or 4, or whole vectors above kDotRows
  int64_t lanes = 0;        // lanes of a task, whole vectors
  int64_t heads = 0;        // KV heads per task, at most

  bool dots() const { return rows <= kDotRows; }
  int64_t partial_floats(int64_t task_heads) const { return task_heads * rows * (padded_dim + 2); }
  int64_t scratch_floats() const {
    const int64_t staged = dots() ? 0 : 2 * kStagedKeys * padded_dim;
    return lanes * (2 * padded_dim + keys.block_n + 10) + staged;
  }
};

// --- backward
// -------------------------------------------------------------------------------------------------

// dk and dv of one (batch, KV head) and the key tiles chunk, chunk + chunks, ...; its share of dq
// goes to a buffer of its own, so that the sum over chunks has a fixed order whatever the thread
// count.
struct BwdUnit {
  int64_t b, head_kv, chunk;
};

struct BwdPlan {
  PrefixAttnParams params;
  PrefixAttnGrads grads;
  KeyTiles keys;
  int64_t block_m = 0;
  int64_t padded_dim = 0;
  int64_t padded_rows = 0;  // seqlen_q rounded up to block_m
  int64_t chunks = 1;
  float* dq_parts = nullptr;       // [chunks][batch][heads_q][padded_rows][padded_dim]
  double* dslope_parts = nullptr;  // [chunks][batch][heads_q]
  float prune_threshold = 0.0f;    // in base 2

  int64_t dq_part_floats() const {
    return params.batch * params.heads_q * padded_rows * padded_dim;
  }
  int64_t tiles_per_chunk() const { return (keys.count + chunks - 1) / chunks; }
  int64_t scratch_floats() const {
    const int64_t head = padded_rows * (2 * params.head_dim + 2 * padded_dim + 5);
    const int64_t sums = 2 * tiles_per_chunk() * keys.block_n * padded_dim;
    const int64_t tile = keys.block_n * (3 * padded_dim + 3 * block_m);
    return head + sums + tile;
  }
};

}  // namespace internvl::cpu
