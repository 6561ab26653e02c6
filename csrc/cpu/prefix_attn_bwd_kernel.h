// Backward: one unit owns the dk and dv of some key tiles of one (batch, KV head) and adds up its
// share of dq.
//
// Per query head the rows are packed once; then, per (key tile, query tile), everything is held
// transposed so that the lanes run over queries: S^T = K Q^T, dP^T = V dO^T, P = 2^(S - lse), dS =
// P * (dP - delta), and dV += P^T dO, dK += dS^T Q, dQ += dS K. delta_i = sum_d dO * O - grad_lse.
// Keys and queries of a pair that see nothing of each other at its rim are left out, and so are
// pairs whose weight vanishes under ALiBi (prune.h). The sums run in a fixed order, so the same
// inputs give the same bits at any thread count. Meaning: semantics.py.
#pragma once

#include "cpu/softmax_grad.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

// sum_d grad_out * out of one row, in fp32.
template <DType kType>
INTERNVL_INLINE float row_dot(const typename Element<kType>::type* a,
                              const typename Element<kType>::type* b, int64_t width) {
  Vec sum{};
  for (int64_t d = 0; d < width; d += kLanes)
    sum += load_row<kType>(a, d, width) * load_row<kType>(b, d, width);
  return horizontal_sum(sum);
}

// lse, delta and what the mask and the pruning ask of query row i.
template <DType kType>
INTERNVL_INLINE void load_query_terms(const BwdPlan& plan, const KeyMask& mask, int64_t b,
                                      int64_t head, int64_t i, const BwdScratch& scratch) {
  const PrefixAttnParams& params = plan.params;
  const int64_t at = (b * params.heads_q + head) * params.seqlen_q + i;
  const bool empty = i >= params.seqlen_q || params.lse[at] == -kInfinity;
  scratch.lse[i] = empty ? kInfinity : params.lse[at] * kLog2E;
  scratch.delta[i] = 0.0f;
  scratch.q_norm[i] = -1.0f;
  if (!empty) {
    scratch.delta[i] = row_dot<kType>(row_of<kType>(plan.grads.grad_out, b, i, head),
                                      row_of<kType>(params.out, b, i, head), params.head_dim);
    if (plan.grads.grad_lse) scratch.delta[i] -= plan.grads.grad_lse[at];
    if (params.alibi_prune)
      scratch.q_norm[i] =
          __builtin_isfinite(scratch.delta[i])
              ? row_norm<kType>(row_of<kType>(params.q, b, i, head), params.head_dim)
              : kInfinity;
  }
  const int64_t p = query_position(mask.first_position, i);
  const bool inside = p >= 0 && p < mask.seqlen_k;
  scratch.inside[i] = inside ? -1 : 0;
  scratch.segments[i] = mask.segments && inside ? mask.segments[p] : 0;
}

template <DType kType>
INTERNVL_INLINE void load_query_head(const BwdPlan& plan, const KeyMask& mask, int64_t b,
                                     int64_t head, const BwdScratch& scratch) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  for (int64_t i = 0; i < plan.padded_rows; ++i)
    load_query_terms<kType>(plan, mask, b, head, i, scratch);
  // Rows without a visible key carry no gradient, whatever stands in them.
  for (int64_t i0 = 0; i0 < plan.padded_rows; i0 += plan.block_m) {
    const int64_t count = smallest(plan.block_m, params.seqlen_q - i0);
    const auto q_row = [&](int64_t r) {
      return scratch.lse[i0 + r] == kInfinity ? nullptr : row_of<kType>(params.q, b, i0 + r, head);
    };
    const auto grad_row = [&](int64_t r) {
      return scratch.lse[i0 + r] == kInfinity ? nullptr
                                              : row_of<kType>(plan.grads.grad_out, b, i0 + r, head);
    };
    const int64_t narrow = i0 * elements<kOperand>(params.head_dim);
    const int64_t wide = elements<kOperand>(i0) * plan.padded_dim;
    pack_row_panels<kOperand, kType>(q_row, count, plan.block_m, params.head_dim,
                                     params.softmax_scale * kLog2E, scratch.q_t + narrow);
    pack_row_panels<kOperand, kType>(grad_row, count, plan.block_m, params.head_dim, 1.0f,
                                     scratch.grad_t + narrow);
    pack_column_panels<kOperand, kType>(q_row, count, plan.block_m, params.head_dim,
                                        plan.padded_dim, scratch.q + wide);
    pack_column_panels<kOperand, kType>(grad_row, count, plan.block_m, params.head_dim,
                                        plan.padded_dim, scratch.grad + wide);
  }
}

template <DType kType>
INTERNVL_INLINE void load_key_tile(const BwdPlan& plan, int64_t b, int64_t head_kv, int64_t tile,
                                   const BwdScratch& scratch) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t j_lo = tile * block_n;
  const auto k_row = key_rows<kType>(params, plan.keys.used, params.k, b, head_kv, j_lo);
  const auto v_row = key_rows<kType>(params, plan.keys.used, params.v, b, head_kv, j_lo);
  pack_rows<kOperand, kType>(k_row, block_n, params.head_dim, 1.0f, scratch.k);
  pack_rows<kOperand, kType>(v_row, block_n, params.head_dim, 1.0f, scratch.v);
  pack_column_panels<kOperand, kType>(k_row, block_n, block_n, params.head_dim, plan.padded_dim,
                                      scratch.k_panels);
}

// All products of one (key tile, query tile) pair. Columns of the transposed tiles are queries.
template <Operand kOperand>
INTERNVL_INLINE double accumulate_tile_pair(const BwdPlan& plan, const KeyMask& mask,
                                            const BwdScratch& scratch, const TilePair& pair,
                                            float* dk, float* dv, float* dq) {
  const int64_t head_dim = plan.params.head_dim;
  const int64_t padded = plan.padded_dim;
  const int64_t block_m = plan.block_m, m0 = pair.m0, columns = block_m - m0;
  const int64_t depth = elements<kOperand>(head_dim), stride = row_elements<kOperand>(head_dim);
  const int64_t narrow = (pair.i0 + m0) * depth;  // whole panels before column m0
  multiply<kOperand, ALayout::kRowMajor>(pair.keys, columns, depth, scratch.k, stride,
                                         scratch.q_t + narrow, depth, scratch.s_t + m0, block_m,
                                         false, plan.params.softmax_scale * kLog2E);
  multiply<kOperand, ALayout::kRowMajor>(pair.keys, columns, depth, scratch.v, stride,
                                         scratch.grad_t + narrow, depth, scratch.ds_t + m0, block_m,
                                         false);
  const double dslope = softmax_grad<kOperand>(plan, mask, scratch, pair);
  const int64_t e0 = elements<kOperand>(m0), rows = elements<kOperand>(block_m);
  const int64_t wide = elements<kOperand>(pair.i0) * padded;
  multiply_from<kOperand>(pair.keys, padded, e0, rows, scratch.s_t, block_m, scratch.grad + wide,
                          dv, padded);
  multiply_from<kOperand>(pair.keys, padded, e0, rows, scratch.ds_t, block_m, scratch.q + wide, dk,
                          padded);
  if constexpr (kOperand == Operand::kPairs) pair_keys(plan, scratch, pair);
  const float* ds = kOperand == Operand::kPairs ? scratch.ds_pairs : scratch.ds_t;
  multiply<kOperand, ALayout::kColumnMajor>(
      columns, padded, elements<kOperand>(pair.keys), ds + m0, block_m, scratch.k_panels,
      elements<kOperand>(plan.keys.block_n), dq + (pair.i0 + m0) * padded, padded, true);
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

// May every query row of the tile at i0 leave the keys [j_lo, j_hi) of norm at most k_norm unread?
// (base 2) Rows without a visible key have nothing to lose.
INTERNVL_INLINE bool prune_pair(const BwdPlan& plan, const KeyMask& mask, const BwdScratch& scratch,
                                float k_norm, const TilePair& pair) {
  const float scale = plan.params.softmax_scale * kLog2E;
  const int64_t end = smallest(pair.i0 + plan.block_m, plan.params.seqlen_q);
  for (int64_t i = pair.i0; i < end; ++i) {
    if (scratch.q_norm[i] < 0.0f) continue;
    const float cutoff = prune_cutoff(pair.slope_log2, scale, scratch.q_norm[i], k_norm,
                                      scratch.lse[i], plan.prune_threshold);
    const int64_t p = query_position(mask.first_position, i);
    if (!prune_tile(cutoff, tile_distance(p, p, pair.j_lo, pair.j_lo + pair.keys))) return false;
  }
  return true;
}

// One key tile against all rows of a query head; returns its share of the slope's gradient.
template <DType kType>
INTERNVL_INLINE double add_key_tile(const BwdPlan& plan, const KeyMask& mask,
                                    const BwdScratch& scratch, int64_t b, int64_t head_kv,
                                    int64_t tile, float slope_log2, float* dk, float* dv,
                                    float* dq) {
  const PrefixAttnParams& params = plan.params;
  const int64_t j_lo = tile * plan.keys.block_n;
  const int64_t j_hi = smallest(j_lo + plan.keys.block_n, params.seqlen_k);
  const KeyTileSummary* summary = plan.keys.summary(b, tile);
  const float k_norm = params.alibi_prune ? key_tile_norm<kType>(params, plan.keys.used, b, head_kv,
                                                                 j_lo, plan.keys.block_n)
                                          : 0.0f;
  bool loaded = false;
  double dslope = 0.0;
  for (int64_t i0 = 0; i0 < params.seqlen_q; i0 += plan.block_m) {
    const int64_t p_lo = query_position(mask.first_position, i0);
    const int64_t p_hi =
        query_position(mask.first_position, smallest(i0 + plan.block_m, params.seqlen_q) - 1);
    const QuerySegments own = query_segments(mask, p_lo, p_hi);
    const TileClass tile_class = classify(mask, summary, own, p_lo, p_hi, j_lo, j_hi);
    if (tile_class == kTileEmpty) continue;
    TilePair pair;
    pair.i0 = i0;
    pair.m0 = tile_query_begin(mask, summary, p_lo, j_lo) / kPanel * kPanel;
    pair.j_lo = j_lo;
    pair.keys = tile_key_end(mask, summary, p_hi, j_hi) - j_lo;
    pair.partial = tile_class == kTilePartial;
    pair.slope_log2 = slope_log2;
    if (params.alibi_prune && prune_pair(plan, mask, scratch, k_norm, pair)) continue;
    if (!loaded) load_key_tile<kType>(plan, b, head_kv, tile, scratch);
    loaded = true;
    dslope += accumulate_tile_pair<kOperandOf<kType>>(plan, mask, scratch, pair, dk, dv, dq);
  }
  return dslope;
}

template <DType kType>
void bwd_unit(const BwdPlan& plan, const BwdUnit& unit, float* memory) {
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t tile_floats = block_n * plan.padded_dim;
  const KeyMask mask = key_mask(params, unit.b);
  const BwdScratch scratch = carve_backward(plan, memory);
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
    for (int64_t tile = unit.chunk, slot = 0; tile < plan.keys.count; tile += plan.chunks, ++slot)
      dslope +=
          add_key_tile<kType>(plan, mask, scratch, unit.b, unit.head_kv, tile, slope_log2,
                              scratch.dk + slot * tile_floats, scratch.dv + slot * tile_floats, dq);
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
