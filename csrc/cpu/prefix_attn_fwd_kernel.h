// Forward: one task is a tile of query rows against a run of key tiles.
//
// Per key tile: S = Q K^T (K packed transposed, softmax_scale * log2(e) folded into Q), the ALiBi
// bias and the mask on S in place, one online-softmax step in base 2, then acc = acc * alpha + P V.
// Full tiles run no mask code; of partial ones a few rows at a time compute the keys that they see.
// Under ALiBi the tiles are walked outward from the queries, and those whose weight vanishes are
// skipped (prune.h). Meaning: semantics.py.
#pragma once

#include "cpu/softmax.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr int64_t kGroupRows = 12;  // whole micro-kernels (gemm.h), whose panels stay in the cache
static_assert(kGroupRows % kRows == 0, "rows left over would run at half speed");

// One key tile of K as row panels and of V as column panels; keys that no query sees become zero
// rows.
template <DType kType>
void pack_kv_tile(const FwdPlan& plan, int64_t b, int64_t head_kv, int64_t tile, float* k_out,
                  float* v_out) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t j_lo = tile * block_n;
  const int64_t rows = smallest(block_n, params.seqlen_k - j_lo);
  const auto k_row = key_rows<kType>(params, plan.keys.used, params.k, b, head_kv, j_lo);
  const auto v_row = key_rows<kType>(params, plan.keys.used, params.v, b, head_kv, j_lo);
  pack_row_panels<kOperand, kType>(k_row, rows, block_n, params.head_dim, 1.0f, k_out);
  pack_column_panels<kOperand, kType>(v_row, rows, block_n, params.head_dim, plan.padded_dim,
                                      v_out);
}

template <DType kType>
INTERNVL_INLINE void load_query_rows(const FwdPlan& plan, const RowTask& task, const KeyMask& mask,
                                     const FwdScratch& scratch) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  const float factor = params.softmax_scale * kLog2E;
  const int64_t stride = row_elements<kOperand>(params.head_dim);
  for (int64_t h = 0; h < task.heads; ++h) {
    const int64_t head = task.head_kv * params.group() + task.head0 + h;
    const auto q_row = [&](int64_t i) {
      return row_of<kType>(params.q, task.b, task.row0 + i, head);
    };
    pack_rows<kOperand, kType>(q_row, task.rows, params.head_dim, factor,
                               scratch.q + h * task.rows * stride);
    for (int64_t i = 0; i < task.rows; ++i) {
      const int64_t r = h * task.rows + i;
      RowState& row = scratch.rows[r];
      row.position = query_position(mask.first_position, task.row0 + i);
      row.slope_log2 = params.alibi_slopes ? params.alibi_slopes[head] * kLog2E : 0.0f;
      row.row_max = -kInfinity;
      const bool inside = row.position >= 0 && row.position < mask.seqlen_k;
      row.inside = inside ? -1 : 0;
      row.segment = mask.segments && inside ? mask.segments[row.position] : 0;
      if (params.alibi_prune)
        row.q_norm = __builtin_fabsf(factor) * row_norm<kType>(q_row(i), params.head_dim);
      store(scratch.row_sum + r * kLanes, Vec{});
      for (int64_t c = 0; c < plan.padded_dim; c += kLanes)
        store(scratch.acc + r * plan.padded_dim + c, Vec{});
    }
  }
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
      store_partial_row(acc, plan.padded_dim, row_max, row_sum,
                        task.partial + r * (plan.padded_dim + 2));
    } else {
      const int64_t head = task.head_kv * params.group() + task.head0 + r / task.rows;
      if (r % task.rows + kRowsAhead < task.rows)
        prefetch_row(
            row_of<kType>(params.out, task.b, task.row0 + r % task.rows + kRowsAhead, head),
            params.head_dim);
      store_out_lse<kType>(params, task.b, task.row0 + r % task.rows, head, acc, row_max, row_sum);
    }
  }
}

// May every row of the task leave the keys [j_lo, j_hi) of norm at most k_norm unread? (base 2)
INTERNVL_INLINE bool prune_rows(const FwdPlan& plan, const FwdScratch& scratch, int64_t rows,
                                float k_norm, int64_t j_lo, int64_t j_hi) {
  for (int64_t r = 0; r < rows; ++r) {
    const RowState& row = scratch.rows[r];
    const float cutoff =
        prune_cutoff(row.slope_log2, 1.0f, row.q_norm, k_norm, row.row_max, plan.prune_threshold);
    if (!prune_tile(cutoff, tile_distance(row.position, row.position, j_lo, j_hi))) return false;
  }
  return true;
}

// The operands of a key tile: packed for the whole call, or here; null when the tile can be
// skipped.
struct TileOperands {
  const float* k;
  const float* v;
};

template <DType kType>
INTERNVL_INLINE TileOperands tile_operands(const FwdPlan& plan, const RowTask& task,
                                           const FwdScratch& scratch, int64_t tile, int64_t keys) {
  const PrefixAttnParams& params = plan.params;
  const int64_t j_lo = tile * plan.keys.block_n;
  const int64_t rows = task.heads * task.rows;
  const int64_t head = task.b * params.heads_kv + task.head_kv - plan.packed_head0;
  const int64_t index = head * plan.keys.count + tile;
  if (params.alibi_prune) {
    const float k_norm = plan.packed_k
                             ? plan.k_norms[index]
                             : key_tile_norm<kType>(params, plan.keys.used, task.b, task.head_kv,
                                                    j_lo, plan.keys.block_n);
    if (prune_rows(plan, scratch, rows, k_norm, j_lo, j_lo + keys)) return {nullptr, nullptr};
  }
  if (plan.packed_k)
    return {plan.packed_k + index * plan.k_tile_floats(),
            plan.packed_v + index * plan.v_tile_floats()};
  pack_kv_tile<kType>(plan, task.b, task.head_kv, tile, scratch.k_tile, scratch.v_tile);
  return {scratch.k_tile, scratch.v_tile};
}

// Rows [first, first + rows) of a task, which lie at positions [p_lo, p_hi] (of every head), and
// the keys [j_lo, j_lo + keys) of a tile that some of them see.
struct RowGroup {
  int64_t first, rows, p_lo, p_hi, j_lo, keys;
  bool partial;
};

// Scores, softmax step, values.
template <DType kType>
INTERNVL_INLINE void add_keys(const FwdPlan& plan, const KeyMask& mask, const FwdScratch& task,
                              const TileOperands& operands, const RowGroup& group) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  const int64_t block_n = plan.keys.block_n;
  const int64_t columns = round_up(group.keys, kPanel);
  const int64_t depth = elements<kOperand>(params.head_dim);
  const int64_t q_stride = row_elements<kOperand>(params.head_dim);
  const FwdScratch scratch = from_row(plan, task, group.first, q_stride);
  const AlibiForm alibi = alibi_form(params.alibi_slopes != nullptr, group.p_lo, group.p_hi,
                                     group.j_lo, group.j_lo + columns);
  multiply<kOperand, ALayout::kRowMajor>(group.rows, columns, depth, scratch.q, q_stride,
                                         operands.k, depth, scratch.s, block_n, false,
                                         params.softmax_scale * kLog2E);
  if (group.partial)
    softmax_tile<kOperand, true>(plan, mask, scratch, alibi, group.rows, group.j_lo, columns);
  else
    softmax_tile<kOperand, false>(plan, mask, scratch, alibi, group.rows, group.j_lo, columns);
  multiply<kOperand, ALayout::kRowMajor>(
      group.rows, plan.padded_dim, elements<kOperand>(group.keys), scratch.s, block_n, operands.v,
      elements<kOperand>(block_n), scratch.acc, plan.padded_dim, true);
}

// One key tile that is not empty. Of a partial one, kGroupRows rows at a time take the keys that
// they see: at the diagonal that is less than half of what the whole task would.
template <DType kType>
INTERNVL_INLINE void add_key_tile(const FwdPlan& plan, const RowTask& task, const KeyMask& mask,
                                  const FwdScratch& scratch, TileClass tile_class, int64_t p_lo,
                                  int64_t tile) {
  const int64_t block_n = plan.keys.block_n, j_lo = tile * block_n, j_hi = j_lo + block_n;
  const KeyTileSummary* summary = plan.keys.summary(task.b, tile);
  const int64_t keys = tile_key_end(mask, summary, p_lo + task.rows - 1, j_hi) - j_lo;
  const TileOperands operands = tile_operands<kType>(plan, task, scratch, tile, keys);
  if (operands.k == nullptr) return;
  const bool partial = tile_class == kTilePartial;
  if (partial) load_key_terms(mask, j_lo, block_n, scratch);
  if (!partial || task.heads > 1) {
    const int64_t rows = task.heads * task.rows;
    return add_keys<kType>(plan, mask, scratch, operands,
                           {0, rows, p_lo, p_lo + task.rows - 1, j_lo, keys, partial});
  }
  for (int64_t r = 0; r < task.rows; r += kGroupRows) {
    RowGroup group = {r, smallest(kGroupRows, task.rows - r), p_lo + r, 0, j_lo, 0, true};
    group.p_hi = group.p_lo + group.rows - 1;
    const QuerySegments own = query_segments(mask, group.p_lo, group.p_hi);
    const TileClass group_class = classify(mask, summary, own, group.p_lo, group.p_hi, j_lo, j_hi);
    if (group_class == kTileEmpty) continue;
    group.keys = tile_key_end(mask, summary, group.p_hi, j_hi) - j_lo;
    group.partial = group_class == kTilePartial;
    add_keys<kType>(plan, mask, scratch, operands, group);
  }
}

// Key tile number `step` of the task's walk: upward, or outward from the tile of the queries, first
// to the left of it.
INTERNVL_INLINE int64_t walk(const FwdPlan& plan, const RowTask& task, int64_t p_hi, int64_t step) {
  if (!plan.params.alibi_slopes) return task.tile_begin + step;
  const int64_t home =
      larger(task.tile_begin, smaller(larger(p_hi, 0) / plan.keys.block_n, task.tile_end - 1));
  return step <= home - task.tile_begin ? home - step : task.tile_begin + step;
}

template <DType kType>
void fwd_row_tile(const FwdPlan& plan, const RowTask& task, float* memory) {
  const int64_t block_n = plan.keys.block_n;
  const KeyMask mask = key_mask(plan.params, task.b);
  const FwdScratch scratch = carve(plan, memory);
  load_query_rows<kType>(plan, task, mask, scratch);
  const int64_t p_lo = query_position(mask.first_position, task.row0);
  const int64_t p_hi = p_lo + task.rows - 1;
  const QuerySegments own = query_segments(mask, p_lo, p_hi);

  for (int64_t step = 0; step < task.tile_end - task.tile_begin; ++step) {
    const int64_t tile = walk(plan, task, p_hi, step);
    const int64_t j_lo = tile * block_n;
    const KeyTileSummary* summary = plan.keys.summary(task.b, tile);
    const TileClass tile_class = classify(mask, summary, own, p_lo, p_hi, j_lo, j_lo + block_n);
    if (tile_class == kTileEmpty) continue;
    add_key_tile<kType>(plan, task, mask, scratch, tile_class, p_lo, tile);
  }
  finish_rows<kType>(plan, task, scratch);
}

// Adds up the key splits of one row tile; `task` is the first of plan.splits consecutive tasks.
template <DType kType>
void merge_splits(const FwdPlan& plan, const RowTask& task, float* memory) {
  for (int64_t r = 0; r < task.heads * task.rows; ++r) {
    const int64_t head = task.head_kv * plan.params.group() + task.head0 + r / task.rows;
    merge_row<kType>(plan.params, task.b, task.row0 + r % task.rows, head,
                     task.partial + r * (plan.padded_dim + 2), plan.splits, plan.partial_floats(),
                     plan.padded_dim, memory);
  }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
