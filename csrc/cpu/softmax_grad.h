// The backward's working memory, and its elementwise step: S^T and dP^T of a tile pair become P^T
// and dS^T, in place.
#pragma once

#include "cpu/softmax.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

struct BwdScratch {
  // one query head, all rows
  float* q_t;     // row panels, times softmax_scale * log2(e) unless pairs
  float* grad_t;  // row panels of grad_out
  float* q;       // column panels per query tile
  float* grad;    // column panels per query tile
  float* lse;     // in base 2; +inf on rows without a visible key, so that P vanishes
  float* delta;
  float* q_norm;  // infinite where a gradient is not finite, -1 without a visible key
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
  float* ds_pairs;  // [elements of block_n][block_m]: dS^T paired along the keys
};

// A key tile against a query tile, cut down to what can see each other.
struct TilePair {
  int64_t i0;  // first query row of the tile
  int64_t m0;  // columns of the tile before this one see no key; a multiple of kPanel
  int64_t j_lo;
  int64_t keys;  // from j_lo
  bool partial;
  float slope_log2;
};

INTERNVL_INLINE BwdScratch carve_backward(const BwdPlan& plan, float* memory) {
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
  scratch.q_norm = take(rows);
  scratch.segments = reinterpret_cast<int32_t*>(take(rows));
  scratch.inside = reinterpret_cast<int32_t*>(take(rows));
  scratch.dk = take(plan.tiles_per_chunk() * block_n * plan.padded_dim);
  scratch.dv = take(plan.tiles_per_chunk() * block_n * plan.padded_dim);
  scratch.k = take(block_n * plan.padded_dim);
  scratch.v = take(block_n * plan.padded_dim);
  scratch.k_panels = take(block_n * plan.padded_dim);
  scratch.s_t = take(block_n * plan.block_m);
  scratch.ds_t = take(block_n * plan.block_m);
  scratch.ds_pairs = take(block_n * plan.block_m);
  return scratch;
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

template <Operand kOperand>
INTERNVL_INLINE void store_operand(float* row, int64_t m, Vec x) {
  if constexpr (kOperand == Operand::kPairs)
    *reinterpret_cast<VecHUnaligned*>(reinterpret_cast<uint16_t*>(row) + m) = round_to_pairs(x);
  else
    store(row + m, x);
}

// S^T, dP^T -> P^T, dS^T in place for one tile pair (pairs: in the first half of each row); returns
// sum dS * |p - j| (for the slope's gradient).
template <Operand kOperand, bool kAlibi, bool kPartial>
__attribute__((noinline)) double softmax_grad_tile(const BwdPlan& plan, const KeyMask& mask,
                                                   const BwdScratch& scratch,
                                                   const TilePair& pair) {
  const Vec slope = broadcast(pair.slope_log2);
  const int64_t p0 = query_position(mask.first_position, pair.i0);
  Vec weighted{};
  for (int64_t n = 0; n < pair.keys; ++n) {
    const Vec distance0 = to_float(lane_index()) + static_cast<float>(p0 - (pair.j_lo + n));
    float* s = scratch.s_t + n * plan.block_m;
    float* ds = scratch.ds_t + n * plan.block_m;
    for (int64_t m = pair.m0; m < plan.block_m; m += kLanes) {
      Vec x = load(s + m);
      const Vec distance = absolute(distance0 + static_cast<float>(m));
      if (kAlibi) x -= slope * distance;
      Vec probability = exp2(x - load(scratch.lse + pair.i0 + m));
      Vec score_grad = probability * (load(ds + m) - load(scratch.delta + pair.i0 + m));
      if (kPartial) {
        const VecI seen = visible_lanes(mask, scratch, pair.i0 + m, pair.j_lo + n);
        probability = select(seen, probability, Vec{});
        score_grad = select(seen, score_grad, Vec{});
      }
      if (kAlibi) weighted += score_grad * distance;
      store_operand<kOperand>(s, m, probability);
      store_operand<kOperand>(ds, m, score_grad);
    }
  }
  return horizontal_sum(weighted);
}

// dS^T again with the keys paired, for the product whose depth they are.
INTERNVL_INLINE void pair_keys(const BwdPlan& plan, const BwdScratch& scratch,
                               const TilePair& pair) {
  for (int64_t n = 0; n < pair.keys; n += 2) {
    const auto* first = reinterpret_cast<const uint16_t*>(scratch.ds_t + n * plan.block_m);
    const auto* second = reinterpret_cast<const uint16_t*>(scratch.ds_t + (n + 1) * plan.block_m);
    for (int64_t m = pair.m0; m < plan.block_m; m += kLanes) {
      const VecH a = *reinterpret_cast<const VecHUnaligned*>(first + m);
      const VecH b =
          n + 1 < pair.keys ? *reinterpret_cast<const VecHUnaligned*>(second + m) : VecH{};
      store(scratch.ds_pairs + n / 2 * plan.block_m + m, make_pairs(a, b));
    }
  }
}

template <Operand kOperand>
INTERNVL_INLINE double softmax_grad(const BwdPlan& plan, const KeyMask& mask,
                                    const BwdScratch& scratch, const TilePair& pair) {
  if (plan.params.alibi_slopes)
    return pair.partial ? softmax_grad_tile<kOperand, true, true>(plan, mask, scratch, pair)
                        : softmax_grad_tile<kOperand, true, false>(plan, mask, scratch, pair);
  return pair.partial ? softmax_grad_tile<kOperand, false, true>(plan, mask, scratch, pair)
                      : softmax_grad_tile<kOperand, false, false>(plan, mask, scratch, pair);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
