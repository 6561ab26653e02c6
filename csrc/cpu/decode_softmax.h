// Decoding's working memory and its online softmax. Lanes are query rows, so that one step serves
// all heads of a task at once and needs no sums across lanes.
#pragma once

#include "cpu/plan.h"
#include "cpu/row_results.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

// A worker's scratch memory, by lane or by key.
struct DecodeScratch {
  int64_t* position;  // [lanes] p
  int32_t* causal_p;  // [lanes] p, clamped for int32 arithmetic
  int32_t* segment;   // [lanes]
  int32_t* inside;    // [lanes] -1 when p is an index of segment_ids, else 0
  float* slope_log2;  // [lanes]
  float* from_tile;   // [lanes] p - j_lo of the current tile
  float* row_max;     // [lanes] in base 2, bias included
  float* row_sum;     // [lanes]
  float* q;           // dots: [lanes][padded_dim]; else panels of padded_rows columns per head
  float* acc;         // [lanes][padded_dim]
  float* s;           // [block_n][lanes]: scores, then probabilities
  float* k;           // [kStagedKeys][padded_dim] converted keys
  float* v;           // [kStagedKeys][padded_dim] panels of values
};

INTERNVL_INLINE DecodeScratch carve_decode(const DecodePlan& plan, float* memory) {
  const int64_t lanes = plan.lanes, block = plan.lanes * plan.padded_dim;
  DecodeScratch scratch;
  scratch.q = memory;
  scratch.acc = scratch.q + block;
  scratch.s = scratch.acc + block;
  scratch.position = reinterpret_cast<int64_t*>(scratch.s + plan.keys.block_n * lanes);
  scratch.causal_p = reinterpret_cast<int32_t*>(scratch.position + lanes);
  scratch.segment = scratch.causal_p + lanes;
  scratch.inside = scratch.segment + lanes;
  scratch.slope_log2 = reinterpret_cast<float*>(scratch.inside + lanes);
  scratch.from_tile = scratch.slope_log2 + lanes;
  scratch.row_max = scratch.from_tile + lanes;
  scratch.row_sum = scratch.row_max + lanes;
  scratch.k = scratch.row_sum + lanes;
  scratch.v = scratch.k + kStagedKeys * plan.padded_dim;
  return scratch;
}

// Visibility of key j for kLanes query rows: all ones where visible.
INTERNVL_INLINE VecI visible_to(const KeyMask& mask, const DecodeScratch& scratch, int64_t lane,
                                int32_t j) {
  const int flags = mask.flags ? mask.flags[j] : 0;
  const bool valid = mask.flags ? flag_valid(flags)
                                : valid_in_range(static_cast<int64_t>(j), mask.start, mask.end);
  const bool open = mask.flags ? flag_bidirectional(flags)
                               : bidirectional_in_prefix(static_cast<int64_t>(j), mask.prefix_len);
  VecI same_segment = VecI{} - 1;
  if (mask.segments)
    same_segment = (load(scratch.segment + lane) == mask.segments[j]) & load(scratch.inside + lane);
  const VecI is_causal =
      causal(load(scratch.causal_p + lane), j, static_cast<int32_t>(mask.window));
  return visible(VecI{} - static_cast<int32_t>(valid), same_segment,
                 VecI{} - static_cast<int32_t>(open), is_causal);
}

// Raises the maxima of kLanes rows and rescales what they have added up; returns what exp2 must
// subtract. A row that has seen nothing keeps -inf; 0 stands in so that -inf - -inf never arises.
INTERNVL_INLINE Vec raise_maxima(const DecodePlan& plan, const DecodeScratch& scratch, int64_t lane,
                                 Vec tile_max) {
  const Vec old_max = load(scratch.row_max + lane);
  const VecI rises = tile_max > old_max;
  const Vec row_max = select(rises, tile_max, old_max);
  const Vec shift = select(row_max == broadcast(-kInfinity), Vec{}, row_max);
  const Vec alpha = select(rises, exp2(old_max - shift), broadcast(1.0f));
  for (int i = 0; i < kLanes; ++i) {
    if (!rises[i]) continue;
    float* acc = scratch.acc + (lane + i) * plan.padded_dim;
    const Vec factor = broadcast(alpha[i]);
    for (int64_t d = 0; d < plan.padded_dim; d += kLanes) store(acc + d, load(acc + d) * factor);
  }
  store(scratch.row_max + lane, row_max);
  store(scratch.row_sum + lane, load(scratch.row_sum + lane) * alpha);
  return shift;
}

// One online-softmax step of the tile in base 2, in place.
template <bool kAlibi, bool kPartial>
__attribute__((noinline)) void decode_softmax(const DecodePlan& plan, const KeyMask& mask,
                                              const DecodeScratch& scratch, int64_t j_lo,
                                              int64_t keys) {
  const int64_t lanes = plan.lanes;
  for (int64_t lane = 0; lane < lanes; ++lane)
    scratch.from_tile[lane] = static_cast<float>(scratch.position[lane] - j_lo);
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    float* s = scratch.s + lane;
    const Vec slope = load(scratch.slope_log2 + lane);
    const Vec from_tile = load(scratch.from_tile + lane);
    Vec top = broadcast(-kInfinity);
    for (int64_t j = 0; j < keys; ++j) {
      Vec x = load(s + j * lanes);
      if (kAlibi) x -= slope * absolute(from_tile - static_cast<float>(j));
      if (kPartial)
        x = select(visible_to(mask, scratch, lane, static_cast<int32_t>(j_lo + j)), x,
                   broadcast(-kInfinity));
      if (kAlibi || kPartial) store(s + j * lanes, x);
      top = maximum(x, top);
    }
    const Vec shift = raise_maxima(plan, scratch, lane, top);
    Vec sum{};
    for (int64_t j = 0; j < keys; ++j) {
      const Vec probability = exp2(load(s + j * lanes) - shift);
      store(s + j * lanes, probability);
      sum += probability;
    }
    store(scratch.row_sum + lane, load(scratch.row_sum + lane) + sum);
  }
}

INTERNVL_INLINE void decode_softmax(const DecodePlan& plan, const KeyMask& mask,
                                    const DecodeScratch& scratch, bool partial, int64_t j_lo,
                                    int64_t keys) {
  const bool alibi = plan.params.alibi_slopes != nullptr;
  if (alibi && partial) return decode_softmax<true, true>(plan, mask, scratch, j_lo, keys);
  if (alibi) return decode_softmax<true, false>(plan, mask, scratch, j_lo, keys);
  if (partial) return decode_softmax<false, true>(plan, mask, scratch, j_lo, keys);
  decode_softmax<false, false>(plan, mask, scratch, j_lo, keys);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
