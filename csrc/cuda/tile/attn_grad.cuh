// What the backwards of prefix_attn share, whatever their tiles and instructions: what a call's
// kernels are told, which block works on what, the mask of tiles and single scores, and P and dS of
// a score.
#pragma once

#include "common/params.h"
#include "common/prune.h"
#include "cuda/ptx/warp.cuh"
#include "cuda/tile/mask_tile.cuh"

namespace internvl::tile {

// One call's working memory and sizes, filled on the host (attn_grad_launch.cuh).
struct BwdArgs {
  PrefixAttnParams params;
  PrefixAttnGrads grads;
  int64_t group = 1;                   // query heads of a KV head
  KeySummaries keys;                   // per tile of kBlockKeys
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
INTERNVL_PTX_FN BlockPlace place_of_block(int64_t tiles, int64_t batch, int64_t heads,
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
INTERNVL_PTX_FN QueryTile query_tile(const BwdArgs& args, const KeyMask& mask, int64_t b,
                                     int64_t row_tile) {
  QueryTile rows;
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
INTERNVL_PTX_FN KeyTileSummary merged_summary(const KeyMask& mask, int64_t first, int64_t tiles) {
  KeyTileSummary sum;
  if (!mask.tiles) return sum;
  sum = unpack_summary(ptx::ld_global_nc(mask.tiles + first));
  INTERNVL_UNROLL
  for (int part = 1; part < kParts; ++part) {
    if (first + part >= tiles) continue;
    const KeyTileSummary own = unpack_summary(ptx::ld_global_nc(mask.tiles + first + part));
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

// May kRowParts query tiles and kKeyParts key tiles at that distance of each other be left out?
// Only with args.row_norms.
template <int kRowParts, int kKeyParts>
INTERNVL_PTX_FN bool prune_tiles(const BwdArgs& args, int64_t b, int64_t h, int64_t row_tile,
                                 int64_t key_tile, int64_t distance) {
  float q_norm = 0.0f, k_norm = 0.0f, lowest = INFINITY;
  const ptx::F32x2* rows = args.row_norms + (b * args.params.heads_q + h) * args.row_tiles;
  INTERNVL_UNROLL
  for (int part = 0; part < kRowParts; ++part) {
    if (row_tile + part >= args.row_tiles) continue;
    const ptx::F32x2 own = ptx::ld_global_nc(rows + row_tile + part);
    q_norm = ptx::fmax(q_norm, own.x);
    lowest = ptx::fmin(lowest, own.y);
  }
  const float* keys = args.key_norms + (b * args.params.heads_kv + h / args.group) * args.key_tiles;
  INTERNVL_UNROLL
  for (int part = 0; part < kKeyParts; ++part)
    if (key_tile + part < args.key_tiles)
      k_norm = ptx::fmax(k_norm, ptx::ld_global_nc(keys + key_tile + part));
  const float cutoff =
      prune_cutoff(ptx::ld_global_nc(args.params.alibi_slopes + h), args.params.softmax_scale,
                   q_norm, k_norm, lowest, args.prune_threshold);
  return prune_tile(cutoff, distance);
}

// What a query row, and a key, bring to the mask of single scores.
struct MaskedQuery {
  int32_t p;  // clamped
  QuerySegment segment;
};

struct MaskedKey {
  Key key;
  int32_t segment;
};

INTERNVL_PTX_FN MaskedQuery masked_query(const KeyMask& mask, int64_t row) {
  return {clamped_position(mask, row), query_segment(mask, row)};
}

INTERNVL_PTX_FN MaskedKey masked_key(const KeyMask& mask, int32_t j) {
  return {key_at(mask, j), mask.segments ? key_segment(mask, j) : 0};
}

INTERNVL_PTX_FN bool sees(const KeyMask& mask, const MaskedQuery& query, const MaskedKey& key) {
  const bool same_segment =
      !mask.segments || (query.segment.inside && query.segment.id == key.segment);
  return same_segment && sees(mask, query.p, key.key);
}

// The bits of all lanes: lane l's at bit l.
INTERNVL_PTX_FN uint32_t warp_bits(bool value) {
  uint32_t bits = value ? 1u << (threadIdx.x % 32) : 0;
  INTERNVL_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) bits |= ptx::shfl_bfly(bits, mask);
  return bits;
}

// Number of the lowest set bit.
INTERNVL_PTX_FN int lowest_bit(uint32_t bits) {
  const uint32_t lowest = bits & (~bits + 1);  // a power of two: its exponent as fp32
  return static_cast<int>(ptx::bits_as<uint32_t>(static_cast<float>(lowest)) >> 23) - 127;
}

// P and dS of one score, in place of s and dp. lse is +inf for rows without gradient.
struct ScoreGrad {
  float scale_log2;
  float slope_log2;

  template <bool kAlibi>
  INTERNVL_PTX_FN float probability(float s, float lse_log2, float distance) const {
    float x = ptx::fma(s, scale_log2, -lse_log2);
    if (kAlibi) x = ptx::fma(-slope_log2, fabsf(distance), x);
    return ptx::ex2(x);
  }

  template <bool kAlibi>
  INTERNVL_PTX_FN void apply(float& s, float& dp, float lse_log2, float delta,
                             float distance) const {
    s = probability<kAlibi>(s, lse_log2, distance);
    dp = s * (dp - delta);
  }
};

}  // namespace internvl::tile
