// Backward: one unit owns the dk and dv of some key tiles of one (batch, KV head) and adds up its
// share of dq.
//
// Per query head the rows are packed once; then, per (key tile, query tile), everything is held
// transposed so that the lanes run over queries: S^T = K Q^T, dP^T = V dO^T, P = 2^(S - lse), dS =
// P * (dP - delta), and dV += P^T dO, dK += dS^T Q, dQ += dS K. delta_i = sum_d dO * O - grad_lse.
// The sums run in a fixed order, so the same inputs give the same bits at any thread count.
// Meaning: semantics.py.
#pragma once

#include "cpu/prefix_attn_fwd_kernel.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

struct BwdScratch {
  // one query head, all rows
  float* q_t;     // row panels, times softmax_scale * log2(e)
  float* grad_t;  // row panels of grad_out
  float* q;       // column panels per query tile
  float* grad;    // column panels per query tile
  float* lse;     // in base 2; +inf on rows without a visible key, so that P vanishes
  float* delta;
  int32_t* segments;
  int32_t* inside;
  // dk and dv of the unit's tiles
  float* dk;
  float* dv;
  // one key tile
  float* k;         // row-major
  float* v;         // row-major
  float* k_panels;  // column panels
  float* s_t;       // [block_n][block_m]: S^T, then P^T
  float* ds_t;      // [block_n][block_m]: dP^T, then dS^T
};

INTERNVL_INLINE BwdScratch carve(const BwdPlan& plan, float* memory) {
  const int64_t rows = plan.padded_rows;
  const int64_t block_n = plan.keys.block_n;
  const int64_t head_dim = plan.params.head_dim;
  const auto take = [&memory](int64_t floats) {
    float* start = memory;
    memory += floats;
    return start;
  };
  BwdScratch scratch;
  scratch.q_t = take(rows * head_dim);
  scratch.grad_t = take(rows * head_dim);
  scratch.q = take(rows * plan.padded_dim);
  scratch.grad = take(rows * plan.padded_dim);
  scratch.lse = take(rows);
  scratch.delta = take(rows);
  scratch.segments = reinterpret_cast<int32_t*>(take(rows));
  scratch.inside = reinterpret_cast<int32_t*>(take(rows));
  scratch.dk = take(plan.tiles_per_chunk() * block_n * plan.padded_dim);
  scratch.dv = take(plan.tiles_per_chunk() * block_n * plan.padded_dim);
  scratch.k = take(block_n * plan.padded_dim);
  scratch.v = take(block_n * plan.padded_dim);
  scratch.k_panels = take(block_n * plan.padded_dim);
  scratch.s_t = take(block_n * plan.block_m);
  scratch.ds_t = take(block_n * plan.block_m);
  return scratch;
}

// sum_d grad_out * out of one row, in fp32.
template <DType kType>
INTERNVL_INLINE float row_dot(const typename Element<kType>::type* a,
                              const typename Element<kType>::type* b, int64_t width) {
  Vec sum{};
  for (int64_t d = 0; d < width; d += kLanes)
    sum += load_row<kType>(a, d, width) * load_row<kType>(b, d, width);
  return horizontal_sum(sum);
}

template <DType kType>
INTERNVL_INLINE void load_query_head(const BwdPlan& plan, const KeyMask& mask, int64_t b,
                                     int64_t head, const BwdScratch& scratch) {
  const PrefixAttnParams& params = plan.params;
  const int64_t rows = params.seqlen_q;
  const int64_t offset = (b * params.heads_q + head) * rows;
  for (int64_t i = 0; i < plan.padded_rows; ++i) {
    const bool empty = i >= rows || params.lse[offset + i] == -kInfinity;
    scratch.lse[i] = empty ? kInfinity : params.lse[offset + i] * kLog2E;
    scratch.delta[i] = 0.0f;
    if (!empty) {
      scratch.delta[i] = row_dot<kType>(row_of<kType>(plan.grads.grad_out, b, i, head),
                                        row_of<kType>(params.out, b, i, head), params.head_dim);
      if (plan.grads.grad_lse) scratch.delta[i] -= plan.grads.grad_lse[offset + i];
    }
    const int64_t p = query_position(mask.first_position, i);
    const bool inside = p >= 0 && p < mask.seqlen_k;
    scratch.inside[i] = inside ? -1 : 0;
    scratch.segments[i] = mask.segments && inside ? mask.segments[p] : 0;
  }
  // Rows without a visible key carry no gradient, whatever stands in them.
  for (int64_t i0 = 0; i0 < plan.padded_rows; i0 += plan.block_m) {
    const int64_t count = smallest(plan.block_m, rows - i0);
    const auto q_row = [&](int64_t r) {
      return scratch.lse[i0 + r] == kInfinity ? nullptr : row_of<kType>(params.q, b, i0 + r, head);
    };
    const auto grad_row = [&](int64_t r) {
      return scratch.lse[i0 + r] == kInfinity ? nullptr
                                              : row_of<kType>(plan.grads.grad_out, b, i0 + r, head);
    };
    const float factor = params.softmax_scale * kLog2E;
    const int64_t narrow = i0 * params.head_dim, wide = i0 * plan.padded_dim;
    pack_row_panels<kType>(q_row, count, plan.block_m, params.head_dim, factor,
                           scratch.q_t + narrow);
    pack_row_panels<kType>(grad_row, count, plan.block_m, params.head_dim, 1.0f,
                           scratch.grad_t + narrow);
    pack_column_panels<kType>(q_row, count, plan.block_m, params.head_dim, plan.padded_dim,
                              scratch.q + wide);
    pack_column_panels<kType>(grad_row, count, plan.block_m, params.head_dim, plan.padded_dim,
                              scratch.grad + wide);
  }
}

template <DType kType>
INTERNVL_INLINE void load_key_tile(const BwdPlan& plan, int64_t b, int64_t head_kv, int64_t tile,
                                   const BwdScratch& scratch) {
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t j_lo = tile * block_n;
  const int64_t rows = smallest(block_n, params.seqlen_k - j_lo);
  const uint8_t* used = plan.keys.used + b * params.seqlen_k + j_lo;
  const auto k_row = [&](int64_t r) {
    return r < rows && used[r] ? row_of<kType>(params.k, b, j_lo + r, head_kv) : nullptr;
  };
  const auto v_row = [&](int64_t r) {
    return r < rows && used[r] ? row_of<kType>(params.v, b, j_lo + r, head_kv) : nullptr;
  };
  pack_rows<kType>(k_row, block_n, params.head_dim, plan.padded_dim, 1.0f, scratch.k);
  pack_rows<kType>(v_row, block_n, params.head_dim, plan.padded_dim, 1.0f, scratch.v);
  pack_column_panels<kType>(k_row, rows, block_n, params.head_dim, plan.padded_dim,
                            scratch.k_panels);
}

// Visibility of key j for kLanes query rows from `i`: all ones where visible. Rows beyond seqlen_q
// need no mask: their lse is +inf and their P is 0.
INTERNVL_INLINE VecI visible_lanes(const KeyMask& mask, const BwdScratch& scratch, int64_t i,
                                   int64_t j) {
  VecI p;
  for (int lane = 0; lane < kLanes; ++lane)
    p[lane] =
        clamp_position(query_position(mask.first_position, i + lane), mask.seqlen_k, mask.window);
  const VecI is_causal = causal(p, static_cast<int32_t>(j), static_cast<int32_t>(mask.window));
  bool valid, bidirectional;
  if (mask.flags) {
    valid = flag_valid(static_cast<int>(mask.flags[j]));
    bidirectional = flag_bidirectional(static_cast<int>(mask.flags[j]));
  } else {
    valid = valid_in_range(j, mask.start, mask.end);
    bidirectional = bidirectional_in_prefix(j, mask.prefix_len);
  }
  VecI same_segment = VecI{} - 1;
  if (mask.segments)
    same_segment = (load(scratch.segments + i) == mask.segments[j]) & load(scratch.inside + i);
  return visible(VecI{} - static_cast<int>(valid), same_segment,
                 VecI{} - static_cast<int>(bidirectional), is_causal);
}

// S^T, dP^T -> P^T, dS^T in place for one tile pair; returns sum dS * |p - j| (for the slope's
// gradient).
template <bool kAlibi, bool kPartial>
INTERNVL_INLINE double softmax_grad_tile(const BwdPlan& plan, const KeyMask& mask,
                                         const BwdScratch& scratch, float slope_log2, int64_t i0,
                                         int64_t j_lo, int64_t keys) {
  const Vec slope = broadcast(slope_log2);
  const int64_t p0 = query_position(mask.first_position, i0);
  double total = 0.0;
  for (int64_t n = 0; n < keys; ++n) {
    const Vec distance0 = to_float(lane_index()) + static_cast<float>(p0 - (j_lo + n));
    float* s = scratch.s_t + n * plan.block_m;
    float* ds = scratch.ds_t + n * plan.block_m;
    Vec weighted{};
    for (int64_t m = 0; m < plan.block_m; m += kLanes) {
      Vec x = load(s + m);
      const Vec distance = absolute(distance0 + static_cast<float>(m));
      if (kAlibi) x -= slope * distance;
      Vec probability = exp2(x - load(scratch.lse + i0 + m));
      Vec score_grad = probability * (load(ds + m) - load(scratch.delta + i0 + m));
      if (kPartial) {
        const VecI seen = visible_lanes(mask, scratch, i0 + m, j_lo + n);
        probability = select(seen, probability, Vec{});
        score_grad = select(seen, score_grad, Vec{});
      }
      if (kAlibi) weighted += score_grad * distance;
      store(s + m, probability);
      store(ds + m, score_grad);
    }
    if (kAlibi) total += horizontal_sum(weighted);
  }
  return total;
}

// All products of one (key tile, query tile) pair. Columns of the transposed tiles are queries.
INTERNVL_INLINE double accumulate_tile_pair(const BwdPlan& plan, const KeyMask& mask,
                                            const BwdScratch& scratch, bool partial,
                                            float slope_log2, int64_t i0, int64_t j_lo,
                                            int64_t keys, float* dk, float* dv, float* dq) {
  const int64_t head_dim = plan.params.head_dim;
  const int64_t padded = plan.padded_dim;
  const int64_t block_m = plan.block_m;
  const int64_t narrow = i0 * head_dim, wide = i0 * padded;
  multiply<ALayout::kRowMajor>(keys, block_m, head_dim, scratch.k, padded, scratch.q_t + narrow,
                               head_dim, scratch.s_t, block_m, false);
  multiply<ALayout::kRowMajor>(keys, block_m, head_dim, scratch.v, padded, scratch.grad_t + narrow,
                               head_dim, scratch.ds_t, block_m, false);
  double dslope = 0.0;
  if (plan.params.alibi_slopes)
    dslope = partial
                 ? softmax_grad_tile<true, true>(plan, mask, scratch, slope_log2, i0, j_lo, keys)
                 : softmax_grad_tile<true, false>(plan, mask, scratch, slope_log2, i0, j_lo, keys);
  else if (partial)
    softmax_grad_tile<false, true>(plan, mask, scratch, slope_log2, i0, j_lo, keys);
  else
    softmax_grad_tile<false, false>(plan, mask, scratch, slope_log2, i0, j_lo, keys);
  multiply<ALayout::kRowMajor>(keys, padded, block_m, scratch.s_t, block_m, scratch.grad + wide,
                               block_m, dv, padded, true);
  multiply<ALayout::kRowMajor>(keys, padded, block_m, scratch.ds_t, block_m, scratch.q + wide,
                               block_m, dk, padded, true);
  multiply<ALayout::kColumnMajor>(block_m, padded, keys, scratch.ds_t, block_m, scratch.k_panels,
                                  plan.keys.block_n, dq + wide, padded, true);
  return dslope;
}

template <DType kType>
INTERNVL_INLINE void store_gradient_rows(const View& view, int64_t b, int64_t s0, int64_t head,
                                         int64_t rows, const float* sums, int64_t padded,
                                         int64_t width, float factor) {
  for (int64_t r = 0; r < rows; ++r) {
    auto* out = mutable_row_of<kType>(view, b, s0 + r, head);
    const float* sum = sums + r * padded;
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes)
      Element<kType>::store_vec(out + d, load(sum + d) * factor);
    if (d < width) store_partial<kType>(out + d, load(sum + d) * factor, width - d);
  }
}

template <DType kType>
void bwd_unit(const BwdPlan& plan, const BwdUnit& unit, float* memory) {
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t tile_floats = block_n * plan.padded_dim;
  const KeyMask mask = key_mask(params, unit.b);
  const BwdScratch scratch = carve(plan, memory);
  for (int64_t f = 0; f < 2 * plan.tiles_per_chunk() * tile_floats; f += kLanes)
    store(scratch.dk + f, Vec{});

  for (int64_t g = 0; g < params.group(); ++g) {
    const int64_t head = unit.head_kv * params.group() + g;
    const int64_t part = (unit.chunk * params.batch + unit.b) * params.heads_q + head;
    float* dq = plan.dq_parts + part * plan.padded_rows * plan.padded_dim;
    for (int64_t f = 0; f < plan.padded_rows * plan.padded_dim; f += kLanes) store(dq + f, Vec{});
    const float slope_log2 = params.alibi_slopes ? params.alibi_slopes[head] * kLog2E : 0.0f;
    double dslope = 0.0;
    load_query_head<kType>(plan, mask, unit.b, head, scratch);
    for (int64_t tile = unit.chunk, slot = 0; tile < plan.keys.count; tile += plan.chunks, ++slot) {
      const int64_t j_lo = tile * block_n;
      const int64_t keys = smallest(block_n, params.seqlen_k - j_lo);
      const KeyTileSummary* summary = plan.keys.summary(unit.b, tile);
      bool loaded = false;
      for (int64_t i0 = 0; i0 < params.seqlen_q; i0 += plan.block_m) {
        const int64_t p_lo = query_position(mask.first_position, i0);
        const int64_t p_hi =
            query_position(mask.first_position, smallest(i0 + plan.block_m, params.seqlen_q) - 1);
        const QuerySegments own = query_segments(mask, p_lo, p_hi);
        const TileClass tile_class = classify(mask, summary, own, p_lo, p_hi, j_lo, j_lo + keys);
        if (tile_class == kTileEmpty) continue;
        if (!loaded) load_key_tile<kType>(plan, unit.b, unit.head_kv, tile, scratch);
        loaded = true;
        dslope += accumulate_tile_pair(plan, mask, scratch, tile_class == kTilePartial, slope_log2,
                                       i0, j_lo, keys, scratch.dk + slot * tile_floats,
                                       scratch.dv + slot * tile_floats, dq);
      }
    }
    if (plan.dslope_parts) plan.dslope_parts[part] = -dslope;
  }

  for (int64_t tile = unit.chunk, slot = 0; tile < plan.keys.count; tile += plan.chunks, ++slot) {
    const int64_t j_lo = tile * block_n;
    const int64_t rows = smallest(block_n, params.seqlen_k - j_lo);
    store_gradient_rows<kType>(plan.grads.dk, unit.b, j_lo, unit.head_kv, rows,
                               scratch.dk + slot * tile_floats, plan.padded_dim, params.head_dim,
                               params.softmax_scale);
    store_gradient_rows<kType>(plan.grads.dv, unit.b, j_lo, unit.head_kv, rows,
                               scratch.dv + slot * tile_floats, plan.padded_dim, params.head_dim,
                               1.0f);
  }
}

// dq of rows [row0, row0 + rows) of one query head: the chunks' shares in their fixed order, times
// the scale.
template <DType kType>
void reduce_dq(const BwdPlan& plan, int64_t b, int64_t head, int64_t row0, int64_t rows) {
  const int64_t padded = plan.padded_dim;
  float* first =
      plan.dq_parts + ((b * plan.params.heads_q + head) * plan.padded_rows + row0) * padded;
  for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
    const float* other = first + chunk * plan.dq_part_floats();
    for (int64_t f = 0; f < rows * padded; f += kLanes)
      store(first + f, load(first + f) + load(other + f));
  }
  store_gradient_rows<kType>(plan.grads.dq, b, row0, head, rows, first, padded,
                             plan.params.head_dim, plan.params.softmax_scale);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
