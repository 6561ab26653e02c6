// The softmax of score tiles: ALiBi, mask and one online-softmax step in base 2, in place.
#pragma once

#include "cpu/plan.h"
#include "cpu/row_results.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

// What the softmax step needs to know about each row of the tile.
struct RowState {
  int64_t position;  // p
  float slope_log2;  // alibi slope * log2(e)
  float row_max;     // in base 2, bias included
  float q_norm;      // at least |q| * |softmax_scale| * log2(e); only when pruning
  int32_t segment;
  int32_t inside;  // -1 when p is an index of segment_ids, else 0
};

// The task's slice of the worker's scratch memory.
struct FwdScratch {
  float* q;        // [rows][padded_dim], scaled unless pairs
  float* s;        // [rows][block_n]: scores, then probabilities (pairs: in the first half)
  float* acc;      // [rows][padded_dim]
  float* row_sum;  // [rows][kLanes] partial sums
  RowState* rows;  // [rows]
  int32_t* flags;  // [block_n] of the current tile, general form only
  int32_t* segments;
  float* k_tile;  // packed here when the call packs per task
  float* v_tile;
};

INTERNVL_INLINE FwdScratch carve(const FwdPlan& plan, float* memory) {
  const int64_t block_m = plan.block_m;
  const int64_t block_n = plan.keys.block_n;
  FwdScratch scratch;
  scratch.rows = reinterpret_cast<RowState*>(memory);  // first: it holds the strictest alignment
  static_assert(sizeof(RowState) <= 16 * sizeof(float),
                "RowState must fit the 16 floats reserved per row");
  scratch.row_sum = memory + block_m * 16;
  scratch.q = scratch.row_sum + block_m * 16;
  scratch.s = scratch.q + block_m * plan.padded_dim;
  scratch.acc = scratch.s + block_m * block_n;
  scratch.flags = reinterpret_cast<int32_t*>(scratch.acc + block_m * plan.padded_dim);
  scratch.segments = scratch.flags + block_n;
  scratch.k_tile = reinterpret_cast<float*>(scratch.segments + block_n);
  scratch.v_tile = scratch.k_tile + plan.k_tile_floats();
  return scratch;
}

// The same without the rows before `first`.
INTERNVL_INLINE FwdScratch from_row(const FwdPlan& plan, FwdScratch scratch, int64_t first,
                                    int64_t q_stride) {
  scratch.q += first * q_stride;
  scratch.s += first * plan.keys.block_n;
  scratch.acc += first * plan.padded_dim;
  scratch.row_sum += first * kLanes;
  scratch.rows += first;
  return scratch;
}

// Flags and segments of the tile as lanes; slots beyond the last key are invalid.
INTERNVL_INLINE void load_key_terms(const KeyMask& mask, int64_t j_lo, int64_t block_n,
                                    const FwdScratch& scratch) {
  const int64_t rows = smallest(block_n, mask.seqlen_k - j_lo);
  if (mask.flags)
    for (int64_t j = 0; j < block_n; ++j) scratch.flags[j] = j < rows ? mask.flags[j_lo + j] : 0;
  if (mask.segments)
    for (int64_t j = 0; j < block_n; ++j)
      scratch.segments[j] = j < rows ? mask.segments[j_lo + j] : 0;
}

// Visibility of kLanes keys from tile column c, for one row: all ones where visible.
INTERNVL_INLINE VecI visible_lanes(const KeyMask& mask, const FwdScratch& scratch,
                                   const RowState& row, int32_t p, int64_t j_lo, int64_t c) {
  const VecI j = lane_index() + static_cast<int32_t>(j_lo + c);
  const VecI is_causal = causal(p, j, static_cast<int32_t>(mask.window));
  VecI valid, bidirectional;
  if (mask.flags) {
    const VecI flags = load(scratch.flags + c);
    valid = flag_valid(flags);
    bidirectional = flag_bidirectional(flags);
  } else {
    valid = valid_in_range(j, static_cast<int32_t>(mask.start), static_cast<int32_t>(mask.end));
    bidirectional = bidirectional_in_prefix(j, static_cast<int32_t>(mask.prefix_len));
  }
  VecI same_segment = VecI{} - 1;
  if (mask.segments) same_segment = (load(scratch.segments + c) == row.segment) & row.inside;
  return visible(valid, same_segment, bidirectional, is_causal);
}

// How ALiBi enters a tile. Where every key lies on one side of every query, |p - j| is linear in
// the key: one FMA with the distance from the tile's nearest column, and a constant per row that
// moves into the softmax shift. (Counted from the farthest column, steep slopes would lose the near
// keys.)
enum class AlibiForm { kNone, kKeysBefore, kKeysAfter, kAbsolute };

constexpr bool is_linear(AlibiForm form) {
  return form == AlibiForm::kKeysBefore || form == AlibiForm::kKeysAfter;
}

struct ColumnOffsets {
  float value[2 * kMaxBlockN];  // value[i] = i - (kMaxBlockN - 1)
  constexpr ColumnOffsets() : value() {
    for (int i = 0; i < 2 * kMaxBlockN; ++i) value[i] = static_cast<float>(i - (kMaxBlockN - 1));
  }
};
constexpr ColumnOffsets kColumnOffsets;

INTERNVL_INLINE AlibiForm alibi_form(bool alibi, int64_t p_lo, int64_t p_hi, int64_t j_lo,
                                     int64_t j_hi) {
  if (!alibi) return AlibiForm::kNone;
  if (j_hi - 1 <= p_lo) return AlibiForm::kKeysBefore;
  return p_hi <= j_lo ? AlibiForm::kKeysAfter : AlibiForm::kAbsolute;
}

// What a tile adds to the scores of one row, and what the row's maximum makes of it.
struct RowTerms {
  float gradient;  // linear ALiBi: bias per key away from the nearest one
  float offset;    // linear ALiBi: bias of the nearest key
  float shift;     // what exp2 subtracts
};

// First reading of a row: adds ALiBi and the mask, and returns the largest score. Full tiles with
// linear ALiBi are left as they are: the second reading repeats their one FMA.
template <AlibiForm kAlibi, bool kPartial>
INTERNVL_INLINE float largest_score(const KeyMask& mask, const FwdScratch& scratch,
                                    const RowState& row, const RowTerms& terms,
                                    const float* from_nearest, int64_t j_lo, int64_t columns,
                                    float* s) {
  const float distance0 = static_cast<float>(row.position - j_lo);  // p - j in column 0
  const Vec slope = broadcast(is_linear(kAlibi) ? terms.gradient : row.slope_log2);
  const int32_t p = clamp_position(row.position, mask.seqlen_k, mask.window);
  const Vec distance = broadcast(distance0) - to_float(lane_index());
  Vec tops[kVectors];
  for (int n = 0; n < kVectors; ++n) tops[n] = broadcast(-kInfinity);
  for (int64_t c0 = 0; c0 < columns; c0 += kPanel)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const int64_t c = c0 + n * kLanes;
      Vec x = load(s + c);
      if (is_linear(kAlibi)) x += slope * load(from_nearest + c);
      if (kAlibi == AlibiForm::kAbsolute) x -= slope * absolute(distance - static_cast<float>(c));
      if (kPartial)
        x = select(visible_lanes(mask, scratch, row, p, j_lo, c), x, broadcast(-kInfinity));
      if (kPartial || kAlibi == AlibiForm::kAbsolute) store(s + c, x);
      tops[n] = maximum(x, tops[n]);
    }
  for (int n = 1; n < kVectors; ++n) tops[0] = maximum(tops[n], tops[0]);
  return horizontal_max(tops[0]);
}

// Raises the row's maximum and rescales its sum and accumulator when it rises; returns what exp2
// must subtract. A row that has seen nothing keeps -inf; 0 stands in so that -inf - -inf never
// arises.
INTERNVL_INLINE float raise_maximum(const FwdPlan& plan, const FwdScratch& scratch, int64_t r,
                                    float tile_max) {
  RowState& row = scratch.rows[r];
  const float row_max = row.row_max < tile_max ? tile_max : row.row_max;
  const float shift = row_max == -kInfinity ? 0.0f : row_max;
  if (row_max > row.row_max) {
    const Vec alpha = exp2(broadcast(row.row_max - shift));
    float* row_sum = scratch.row_sum + r * kLanes;
    float* acc = scratch.acc + r * plan.padded_dim;
    store(row_sum, load(row_sum) * alpha);
    for (int64_t d = 0; d < plan.padded_dim; d += kLanes) store(acc + d, load(acc + d) * alpha);
    row.row_max = row_max;
  }
  return shift;
}

// Second reading: scores become probabilities in place (pairs: in the first half of the row), and
// their sum is added to the row's.
template <Operand kOperand, bool kLinear>
INTERNVL_INLINE void probabilities(const RowTerms& terms, const float* from_nearest,
                                   int64_t columns, float* s, float* row_sum) {
  const Vec slope = broadcast(terms.gradient);
  const Vec shift = broadcast(terms.shift);
  Vec sums[kVectors] = {};
  for (int64_t c0 = 0; c0 < columns; c0 += kPanel)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      const int64_t c = c0 + n * kLanes;
      Vec x = load(s + c) - shift;
      if (kLinear) x += slope * load(from_nearest + c);
      const Vec probability = exp2(x);
      sums[n] += probability;
      if constexpr (kOperand == Operand::kPairs)
        *reinterpret_cast<VecHUnaligned*>(reinterpret_cast<uint16_t*>(s) + c) =
            round_to_pairs(probability);
      else
        store(s + c, probability);
    }
  for (int n = 1; n < kVectors; ++n) sums[0] += sums[n];
  store(row_sum, load(row_sum) + sums[0]);
}

// Rows go through the three steps a few at a time: the processor then works on one row's readings
// while another waits for its maximum.
template <Operand kOperand, AlibiForm kAlibi, bool kPartial>
__attribute__((noinline)) void softmax_rows(const FwdPlan& plan, const KeyMask& mask,
                                            const FwdScratch& scratch, int64_t rows, int64_t j_lo,
                                            int64_t columns) {
  constexpr int64_t kTogether = 4;
  constexpr bool kBefore = kAlibi == AlibiForm::kKeysBefore;
  const int64_t nearest = kBefore ? columns - 1 : 0;
  const float* from_nearest = kColumnOffsets.value + (kMaxBlockN - 1) - nearest;
  const int64_t stride = plan.keys.block_n;
  RowTerms terms[kTogether];
  float tile_max[kTogether];
  for (int64_t r0 = 0; r0 < rows; r0 += kTogether) {
    const int64_t count = smallest(kTogether, rows - r0);
    for (int64_t i = 0; i < count; ++i) {
      const RowState& row = scratch.rows[r0 + i];
      terms[i].gradient = kBefore ? row.slope_log2 : -row.slope_log2;
      terms[i].offset = is_linear(kAlibi)
                            ? -terms[i].gradient * static_cast<float>(row.position - j_lo - nearest)
                            : 0.0f;
      tile_max[i] = terms[i].offset +
                    largest_score<kAlibi, kPartial>(mask, scratch, row, terms[i], from_nearest,
                                                    j_lo, columns, scratch.s + (r0 + i) * stride);
    }
    for (int64_t i = 0; i < count; ++i)
      terms[i].shift = raise_maximum(plan, scratch, r0 + i, tile_max[i]) - terms[i].offset;
    for (int64_t i = 0; i < count; ++i)
      probabilities<kOperand, is_linear(kAlibi) && !kPartial>(terms[i], from_nearest, columns,
                                                              scratch.s + (r0 + i) * stride,
                                                              scratch.row_sum + (r0 + i) * kLanes);
  }
}

template <Operand kOperand, bool kPartial>
INTERNVL_INLINE void softmax_tile(const FwdPlan& plan, const KeyMask& mask,
                                  const FwdScratch& scratch, AlibiForm alibi, int64_t rows,
                                  int64_t j_lo, int64_t columns) {
  switch (alibi) {
    case AlibiForm::kNone:
      return softmax_rows<kOperand, AlibiForm::kNone, kPartial>(plan, mask, scratch, rows, j_lo,
                                                                columns);
    case AlibiForm::kKeysBefore:
      return softmax_rows<kOperand, AlibiForm::kKeysBefore, kPartial>(plan, mask, scratch, rows,
                                                                      j_lo, columns);
    case AlibiForm::kKeysAfter:
      return softmax_rows<kOperand, AlibiForm::kKeysAfter, kPartial>(plan, mask, scratch, rows,
                                                                     j_lo, columns);
    case AlibiForm::kAbsolute:
      return softmax_rows<kOperand, AlibiForm::kAbsolute, kPartial>(plan, mask, scratch, rows, j_lo,
                                                                    columns);
  }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
