// Forward (and, with key splits, decode): one task is a tile of query rows against a run of key
// tiles.
//
// Per key tile: S = Q K^T (K packed transposed, softmax_scale * log2(e) folded into Q), the ALiBi
// bias and the mask on S in place, one online-softmax step in base 2, then acc = acc * alpha + P V.
// Full tiles run no mask code; in tiles that cross the diagonal only the key columns that some row
// sees are computed. Meaning: semantics.py.
#pragma once

#include "cpu/direct.h"
#include "cpu/gemm.h"
#include "cpu/plan.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

template <DType kType>
INTERNVL_INLINE const typename Element<kType>::type* row_of(const View& view, int64_t b, int64_t s,
                                                            int64_t h) {
  return static_cast<const typename Element<kType>::type*>(view.data) + b * view.stride_b +
         s * view.stride_s + h * view.stride_h;
}

template <DType kType>
INTERNVL_INLINE typename Element<kType>::type* mutable_row_of(const View& view, int64_t b,
                                                              int64_t s, int64_t h) {
  return const_cast<typename Element<kType>::type*>(row_of<kType>(view, b, s, h));
}

// Row r of the key tile at j_lo, null when no query sees that key: its slot may hold anything.
template <DType kType>
INTERNVL_INLINE auto key_rows(const FwdPlan& plan, const View& view, int64_t b, int64_t head_kv,
                              int64_t j_lo) {
  const uint8_t* used = plan.keys.used + b * plan.params.seqlen_k + j_lo;
  return [=, &view](int64_t r) {
    return used[r] ? row_of<kType>(view, b, j_lo + r, head_kv) : nullptr;
  };
}

// One key tile of K as row panels and of V as column panels; keys that no query sees become zero
// rows.
template <DType kType>
void pack_kv_tile(const FwdPlan& plan, int64_t b, int64_t head_kv, int64_t tile, float* k_out,
                  float* v_out) {
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t j_lo = tile * block_n;
  const int64_t rows = smallest(block_n, params.seqlen_k - j_lo);
  const auto k_row = key_rows<kType>(plan, params.k, b, head_kv, j_lo);
  const auto v_row = key_rows<kType>(plan, params.v, b, head_kv, j_lo);
  pack_row_panels<kType>(k_row, rows, block_n, params.head_dim, 1.0f, k_out);
  pack_column_panels<kType>(v_row, rows, block_n, params.head_dim, plan.padded_dim, v_out);
}

// What the softmax step needs to know about each row of the tile.
struct RowState {
  int64_t position;  // p
  float slope_log2;  // alibi slope * log2(e)
  float row_max;     // in base 2, bias included
  int32_t segment;
  int32_t inside;  // -1 when p is an index of segment_ids, else 0
};

// The task's slice of the worker's scratch memory.
struct FwdScratch {
  float* q;        // [rows][head_dim], scaled
  float* s;        // [rows][block_n]: scores, then probabilities
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
  scratch.s = scratch.q + block_m * plan.params.head_dim;
  scratch.acc = scratch.s + block_m * block_n;
  scratch.flags = reinterpret_cast<int32_t*>(scratch.acc + block_m * plan.padded_dim);
  scratch.segments = scratch.flags + block_n;
  scratch.k_tile = reinterpret_cast<float*>(scratch.segments + block_n);
  scratch.v_tile = scratch.k_tile + plan.k_tile_floats();
  return scratch;
}

template <DType kType>
INTERNVL_INLINE void load_query_rows(const FwdPlan& plan, const RowTask& task, const KeyMask& mask,
                                     const FwdScratch& scratch) {
  const PrefixAttnParams& params = plan.params;
  const float factor = params.softmax_scale * kLog2E;
  for (int64_t h = 0; h < task.heads; ++h) {
    const int64_t head = task.head_kv * params.group() + task.head0 + h;
    for (int64_t i = 0; i < task.rows; ++i) {
      const int64_t r = h * task.rows + i;
      const auto* source = row_of<kType>(params.q, task.b, task.row0 + i, head);
      float* out = scratch.q + r * params.head_dim;
      int64_t d = 0;
      for (; d + kLanes <= params.head_dim; d += kLanes)
        store(out + d, Element<kType>::load_vec(source + d) * factor);
      if (d < params.head_dim)
        store_partial<DType::kFloat32>(
            out + d, load_partial<kType>(source + d, params.head_dim - d) * factor,
            params.head_dim - d);
      RowState& row = scratch.rows[r];
      row.position = query_position(mask.first_position, task.row0 + i);
      row.slope_log2 = params.alibi_slopes ? params.alibi_slopes[head] * kLog2E : 0.0f;
      row.row_max = -kInfinity;
      const bool inside = row.position >= 0 && row.position < mask.seqlen_k;
      row.inside = inside ? -1 : 0;
      row.segment = mask.segments && inside ? mask.segments[row.position] : 0;
      store(scratch.row_sum + r * kLanes, Vec{});
      for (int64_t c = 0; c < plan.padded_dim; c += kLanes)
        store(scratch.acc + r * plan.padded_dim + c, Vec{});
    }
  }
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

// One row of the tile: bias and mask, then the online-softmax step in base 2. Scores become
// probabilities in place; the row's sum and accumulator are rescaled when its maximum rises.
template <AlibiForm kAlibi, bool kPartial>
INTERNVL_INLINE void softmax_row(const FwdPlan& plan, const KeyMask& mask,
                                 const FwdScratch& scratch, int64_t r, int64_t j_lo,
                                 int64_t columns) {
  constexpr bool kLinear = kAlibi == AlibiForm::kKeysBefore || kAlibi == AlibiForm::kKeysAfter;
  constexpr bool kStored =
      kPartial || kAlibi == AlibiForm::kAbsolute;  // else the second loop repeats the one FMA
  RowState& row = scratch.rows[r];
  float* s = scratch.s + r * plan.keys.block_n;
  const float distance0 = static_cast<float>(row.position - j_lo);  // p - j in column 0
  const int64_t nearest = kAlibi == AlibiForm::kKeysBefore ? columns - 1 : 0;
  const float* from_nearest = kColumnOffsets.value + (kMaxBlockN - 1) - nearest;
  const float gradient = kAlibi == AlibiForm::kKeysBefore ? row.slope_log2 : -row.slope_log2;
  const float offset =
      kLinear ? -gradient * static_cast<float>(row.position - j_lo - nearest) : 0.0f;
  const Vec slope = broadcast(kLinear ? gradient : row.slope_log2);
  const int32_t p = clamp_position(row.position, mask.seqlen_k, mask.window);
  const Vec distance = broadcast(distance0) - to_float(lane_index());

  Vec top = broadcast(-kInfinity);
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec x = load(s + c);
    if (kLinear) x += slope * load(from_nearest + c);
    if (kAlibi == AlibiForm::kAbsolute) x -= slope * absolute(distance - static_cast<float>(c));
    if (kPartial)
      x = select(visible_lanes(mask, scratch, row, p, j_lo, c), x, broadcast(-kInfinity));
    if (kStored) store(s + c, x);
    top = maximum(x, top);
  }
  const float tile_max = horizontal_max(top) + offset;
  const float row_max = row.row_max < tile_max ? tile_max : row.row_max;
  // A row that has seen nothing keeps -inf; 0 stands in so that -inf - -inf never arises.
  const float shift = row_max == -kInfinity ? 0.0f : row_max;
  float* row_sum = scratch.row_sum + r * kLanes;
  Vec sum = load(row_sum);
  if (row_max > row.row_max) {
    const Vec alpha = exp2(broadcast(row.row_max - shift));
    float* acc = scratch.acc + r * plan.padded_dim;
    sum *= alpha;
    for (int64_t d = 0; d < plan.padded_dim; d += kLanes) store(acc + d, load(acc + d) * alpha);
    row.row_max = row_max;
  }
  const Vec tile_shift = broadcast(shift - offset);
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec x = load(s + c) - tile_shift;
    if (kLinear && !kStored) x += slope * load(from_nearest + c);
    const Vec probability = exp2(x);
    sum += probability;
    store(s + c, probability);
  }
  store(row_sum, sum);
}

template <AlibiForm kAlibi, bool kPartial>
__attribute__((noinline)) void softmax_rows(const FwdPlan& plan, const KeyMask& mask,
                                            const FwdScratch& scratch, int64_t rows, int64_t j_lo,
                                            int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    softmax_row<kAlibi, kPartial>(plan, mask, scratch, r, j_lo, columns);
}

template <bool kPartial>
INTERNVL_INLINE void softmax_tile(const FwdPlan& plan, const KeyMask& mask,
                                  const FwdScratch& scratch, AlibiForm alibi, int64_t rows,
                                  int64_t j_lo, int64_t columns) {
  switch (alibi) {
    case AlibiForm::kNone:
      return softmax_rows<AlibiForm::kNone, kPartial>(plan, mask, scratch, rows, j_lo, columns);
    case AlibiForm::kKeysBefore:
      return softmax_rows<AlibiForm::kKeysBefore, kPartial>(plan, mask, scratch, rows, j_lo,
                                                            columns);
    case AlibiForm::kKeysAfter:
      return softmax_rows<AlibiForm::kKeysAfter, kPartial>(plan, mask, scratch, rows, j_lo,
                                                           columns);
    case AlibiForm::kAbsolute:
      return softmax_rows<AlibiForm::kAbsolute, kPartial>(plan, mask, scratch, rows, j_lo, columns);
  }
}

INTERNVL_INLINE float natural_lse(float row_max_log2, float row_sum) {
  if (row_max_log2 == kInfinity || row_sum == 0.0f) return row_sum == 0.0f ? -kInfinity : kInfinity;
  return kLn2 * row_max_log2 + __builtin_logf(row_sum);  // NaN sums stay NaN
}

// out and lse of one finished row. A sum of 0 means that nothing was visible: out is 0 and lse
// -inf.
template <DType kType>
INTERNVL_INLINE void store_out_lse(const FwdPlan& plan, int64_t b, int64_t i, int64_t head,
                                   const float* acc, float row_max, float row_sum) {
  const PrefixAttnParams& params = plan.params;
  auto* out = mutable_row_of<kType>(params.out, b, i, head);
  const float inverse = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  int64_t d = 0;
  for (; d + kLanes <= params.head_dim; d += kLanes)
    Element<kType>::store_vec(out + d, load(acc + d) * inverse);
  if (d < params.head_dim)
    store_partial<kType>(out + d, load(acc + d) * inverse, params.head_dim - d);
  params.lse[(b * params.heads_q + head) * params.seqlen_q + i] = natural_lse(row_max, row_sum);
}

template <DType kType>
INTERNVL_INLINE void finish_rows(const FwdPlan& plan, const RowTask& task,
                                 const FwdScratch& scratch) {
  const PrefixAttnParams& params = plan.params;
  for (int64_t r = 0; r < task.heads * task.rows; ++r) {
    const float* acc = scratch.acc + r * plan.padded_dim;
    const float row_max = scratch.rows[r].row_max;
    const float row_sum = horizontal_sum(load(scratch.row_sum + r * kLanes));
    if (task.partial) {
      float* partial = task.partial + r * (plan.padded_dim + 2);
      for (int64_t d = 0; d < plan.padded_dim; d += kLanes) store(partial + d, load(acc + d));
      partial[plan.padded_dim] = row_max;
      partial[plan.padded_dim + 1] = row_sum;
    } else {
      const int64_t head = task.head_kv * params.group() + task.head0 + r / task.rows;
      store_out_lse<kType>(plan, task.b, task.row0 + r % task.rows, head, acc, row_max, row_sum);
    }
  }
}

template <DType kType>
void fwd_row_tile(const FwdPlan& plan, const RowTask& task, float* memory) {
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t rows = task.heads * task.rows;
  const KeyMask mask = key_mask(params, task.b);
  const FwdScratch scratch = carve(plan, memory);
  load_query_rows<kType>(plan, task, mask, scratch);
  const int64_t p_lo = query_position(mask.first_position, task.row0);
  const int64_t p_hi = p_lo + task.rows - 1;
  const QuerySegments own = query_segments(mask, p_lo, p_hi);
  const bool direct = !plan.packed_k && rows <= kDirectRows;

  for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
    const int64_t j_lo = tile * block_n;
    const KeyTileSummary* summary = plan.keys.summary(task.b, tile);
    const TileClass tile_class = classify(mask, summary, own, p_lo, p_hi, j_lo, j_lo + block_n);
    if (tile_class == kTileEmpty) continue;
    const int64_t keys = tile_key_end(mask, summary, p_hi, j_lo + block_n) - j_lo;
    const int64_t columns = round_up(keys, kPanel);
    const float* k_tile = scratch.k_tile;
    const float* v_tile = scratch.v_tile;
    if (plan.packed_k) {
      const int64_t index = (task.b * params.heads_kv + task.head_kv) * plan.keys.count + tile;
      k_tile = plan.packed_k + index * plan.k_tile_floats();
      v_tile = plan.packed_v + index * plan.v_tile_floats();
    } else if (!direct) {
      pack_kv_tile<kType>(plan, task.b, task.head_kv, tile, scratch.k_tile, scratch.v_tile);
    }

    if (direct)
      direct_scores<kType>(rows, keys, params.head_dim, scratch.q,
                           key_rows<kType>(plan, params.k, task.b, task.head_kv, j_lo), scratch.s,
                           block_n);
    else
      multiply<ALayout::kRowMajor>(rows, columns, params.head_dim, scratch.q, params.head_dim,
                                   k_tile, params.head_dim, scratch.s, block_n, false);
    const AlibiForm alibi =
        alibi_form(params.alibi_slopes != nullptr, p_lo, p_hi, j_lo, j_lo + columns);
    if (tile_class == kTileFull) {
      softmax_tile<false>(plan, mask, scratch, alibi, rows, j_lo, columns);
    } else {
      load_key_terms(mask, j_lo, block_n, scratch);
      softmax_tile<true>(plan, mask, scratch, alibi, rows, j_lo, columns);
    }
    if (direct)
      direct_values<kType>(rows, keys, params.head_dim, plan.padded_dim, scratch.s, block_n,
                           key_rows<kType>(plan, params.v, task.b, task.head_kv, j_lo),
                           scratch.acc);
    else
      multiply<ALayout::kRowMajor>(rows, plan.padded_dim, keys, scratch.s, block_n, v_tile, block_n,
                                   scratch.acc, plan.padded_dim, true);
  }
  finish_rows<kType>(plan, task, scratch);
}

// Adds the key splits of one row tile in their fixed order; `task` is the first of plan.splits
// consecutive tasks.
template <DType kType>
void merge_splits(const FwdPlan& plan, const RowTask& task, float* memory) {
  const PrefixAttnParams& params = plan.params;
  for (int64_t r = 0; r < task.heads * task.rows; ++r) {
    const float* parts = task.partial + r * (plan.padded_dim + 2);
    float row_max = -kInfinity;
    for (int64_t split = 0; split < plan.splits; ++split) {
      const float other = parts[split * plan.partial_floats() + plan.padded_dim];
      row_max = row_max < other ? other : row_max;
    }
    const float shift = row_max == -kInfinity ? 0.0f : row_max;
    float row_sum = 0.0f;
    for (int64_t d = 0; d < plan.padded_dim; d += kLanes) store(memory + d, Vec{});
    for (int64_t split = 0; split < plan.splits; ++split) {
      const float* part = parts + split * plan.partial_floats();
      const Vec weight = exp2(broadcast(part[plan.padded_dim] - shift));
      row_sum += weight[0] * part[plan.padded_dim + 1];
      for (int64_t d = 0; d < plan.padded_dim; d += kLanes)
        store(memory + d, load(memory + d) + weight * load(part + d));
    }
    const int64_t head = task.head_kv * params.group() + task.head0 + r / task.rows;
    store_out_lse<kType>(plan, task.b, task.row0 + r % task.rows, head, memory, row_max, row_sum);
  }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
