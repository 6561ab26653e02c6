// Decoding: few query rows per KV head against a run of key tiles, K and V read where they stand.
//
// Scores are kept [key][lane]: lane = KV head of the task * padded_rows + row. Where the heads of a
// key lie side by side ([batch, seqlen, heads, head_dim]) keys are the outer loop and heads the
// inner one, so that memory is read front to back. Products: decode_dots.h, decode_products.h. No
// distance pruning: finding the norms of keys would cost reading them. Meaning: semantics.py.
#pragma once

#include "cpu/decode_dots.h"
#include "cpu/decode_products.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

template <DType kType>
INTERNVL_INLINE void load_queries(const DecodePlan& plan, const DecodeTask& task,
                                  const KeyMask& mask, const DecodeScratch& scratch) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  const float factor = params.softmax_scale * kLog2E;
  for (int64_t i = 0; i < plan.lanes * plan.padded_dim; i += kLanes) {
    store(scratch.q + i, Vec{});
    store(scratch.acc + i, Vec{});
  }
  for (int64_t i = 0; i < plan.keys.block_n * plan.lanes; i += kLanes) store(scratch.s + i, Vec{});
  for (int64_t lane = 0; lane < plan.lanes; ++lane) {
    const int64_t head = task.head0 + lane / plan.padded_rows;
    const int64_t r = smaller(lane % plan.padded_rows, plan.rows - 1);
    const int64_t p = query_position(mask.first_position, r % params.seqlen_q);
    const bool inside = p >= 0 && p < mask.seqlen_k;
    const bool real = head < task.head0 + task.heads && params.alibi_slopes;
    scratch.position[lane] = p;
    scratch.causal_p[lane] = clamp_position(p, mask.seqlen_k, mask.window);
    scratch.inside[lane] = inside ? -1 : 0;
    scratch.segment[lane] = mask.segments && inside ? mask.segments[p] : 0;
    scratch.slope_log2[lane] =
        real ? params.alibi_slopes[head * params.group() + r / params.seqlen_q] * kLog2E : 0.0f;
    scratch.row_max[lane] = -kInfinity;
    scratch.row_sum[lane] = 0.0f;
  }
  for (int64_t h = 0; h < task.heads; ++h) {
    const auto q_row = [&](int64_t r) {
      const int64_t head = (task.head0 + h) * params.group() + r / params.seqlen_q;
      return row_of<kType>(params.q, task.b, r % params.seqlen_q, head);
    };
    float* q = scratch.q + h * plan.padded_rows * plan.padded_dim;
    if (plan.dots())
      for (int64_t r = 0; r < plan.rows; ++r)
        load_query_of_dots<kType>(q_row(r), params.head_dim, factor, q + r * plan.padded_dim);
    else
      pack_row_panels<kOperand, kType>(q_row, plan.rows, plan.padded_rows, params.head_dim, factor,
                                       q);
  }
}

template <DType kType>
INTERNVL_INLINE void finish_decode(const DecodePlan& plan, const DecodeTask& task,
                                   const DecodeScratch& scratch) {
  const PrefixAttnParams& params = plan.params;
  for (int64_t h = 0; h < task.heads; ++h)
    for (int64_t r = 0; r < plan.rows; ++r) {
      const int64_t lane = h * plan.padded_rows + r;
      const float* acc = scratch.acc + lane * plan.padded_dim;
      if (plan.dots()) {
        store_in_order<kType>(acc, plan.padded_dim, scratch.q);
        acc = scratch.q;
      }
      if (task.partial)
        store_partial_row(acc, plan.padded_dim, scratch.row_max[lane], scratch.row_sum[lane],
                          task.partial + (h * plan.rows + r) * (plan.padded_dim + 2));
      else
        store_out_lse<kType>(params, task.b, r % params.seqlen_q,
                             (task.head0 + h) * params.group() + r / params.seqlen_q, acc,
                             scratch.row_max[lane], scratch.row_sum[lane]);
    }
}

template <DType kType>
void decode_task(const DecodePlan& plan, const DecodeTask& task, float* memory) {
  const int64_t block_n = plan.keys.block_n;
  const KeyMask mask = key_mask(plan.params, task.b);
  const DecodeScratch scratch = carve_decode(plan, memory);
  load_queries<kType>(plan, task, mask, scratch);
  const int64_t p_lo = query_position(mask.first_position, 0);
  const int64_t p_hi = p_lo + plan.params.seqlen_q - 1;
  const QuerySegments own = query_segments(mask, p_lo, p_hi);
  for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
    const int64_t j_lo = tile * block_n;
    const KeyTileSummary* summary = plan.keys.summary(task.b, tile);
    const TileClass tile_class = classify(mask, summary, own, p_lo, p_hi, j_lo, j_lo + block_n);
    if (tile_class == kTileEmpty) continue;
    const int64_t keys = tile_key_end(mask, summary, p_hi, j_lo + block_n) - j_lo;
    const bool partial = tile_class == kTilePartial;
    if (plan.padded_rows == 1)
      add_tile_by_dots<kType, 1>(plan, task, mask, scratch, partial, j_lo, keys);
    else if (plan.padded_rows == 2)
      add_tile_by_dots<kType, 2>(plan, task, mask, scratch, partial, j_lo, keys);
    else if (plan.padded_rows == 4)
      add_tile_by_dots<kType, 4>(plan, task, mask, scratch, partial, j_lo, keys);
    else
      add_tile_by_products<kType>(plan, task, mask, scratch, partial, j_lo, keys);
  }
  finish_decode<kType>(plan, task, scratch);
}

// Adds up the key splits of the rows of `task`, the first of its parts.
template <DType kType>
void merge_decode(const DecodePlan& plan, const DecodeTask& task, float* memory) {
  const PrefixAttnParams& params = plan.params;
  for (int64_t row = 0; row < task.heads * plan.rows; ++row) {
    const int64_t r = row % plan.rows;
    const int64_t head = (task.head0 + row / plan.rows) * params.group() + r / params.seqlen_q;
    merge_row<kType>(params, task.b, r % params.seqlen_q, head,
                     task.partial + row * (plan.padded_dim + 2), task.parts,
                     plan.partial_floats(task.heads), plan.padded_dim, memory);
  }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
