// How a decoding call is cut into tasks. Host code, free of PyTorch and of any ISA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/key_tiles.h"

namespace internvl::cpu {

inline bool is_decode(const PrefixAttnParams& params) {
  return params.group() * params.seqlen_q <= kDecodeRows;
}

// Rows, lanes and heads per task. A task takes as many neighbouring heads as its queries and
// accumulators leave room for in a cache: in [batch, seqlen, heads, head_dim] they stand side by
// side, and memory is then read in the order in which it lies.
inline void shape_decode(DecodePlan& plan, int64_t vector_lanes) {
  constexpr int64_t kDotFloats = 2048, kProductFloats = 16384;
  const PrefixAttnParams& params = plan.params;
  plan.rows = params.group() * params.seqlen_q;
  plan.padded_dim = round_up(params.head_dim, plan.dots() ? 2 * vector_lanes : vector_lanes);
  plan.padded_rows = plan.rows > kDotRows ? round_up(plan.rows, vector_lanes)
                     : plan.rows > 2      ? 4
                                          : plan.rows;
  const int64_t room = (plan.dots() ? kDotFloats : kProductFloats) / plan.padded_dim;
  const int64_t step = std::max<int64_t>(1, vector_lanes / plan.padded_rows);
  const int64_t groups =
      ceil_div(params.heads_kv, std::max(step, room / plan.padded_rows / step * step));
  plan.heads = std::min(params.heads_kv, round_up(ceil_div(params.heads_kv, groups), step));
  plan.lanes = round_up(plan.heads * plan.padded_rows, vector_lanes);
}

// Key tiles of batch row b that some query can see.
inline void visible_tiles(const DecodePlan& plan, int64_t b, int64_t* begin, int64_t* end) {
  const KeyMask mask = key_mask(plan.params, b);
  const int64_t p_lo = mask.first_position, p_hi = p_lo + plan.params.seqlen_q - 1;
  int64_t first = 0, last = mask.seqlen_k;
  if (!mask.flags) {
    first = mask.prefix_len > 0 ? 0 : causal_key_begin(p_lo, mask.window);
    first = larger(first, mask.start);
    last = visible_key_end(p_hi, mask.prefix_len, mask.end);
  }
  *begin = first / plan.keys.block_n;
  *end = last > first ? ceil_div(last, plan.keys.block_n) : *begin;
}

// No task has more than a 16th of the call's tiles, however unequal the rows of the batch are; what
// is too short to be cut that way is cut by heads. The cut depends on the call, never on the thread
// count. Returns the floats of all partial results; `partial` of the tasks counts from null.
inline int64_t cut_decode(DecodePlan& plan, int64_t vector_lanes, std::vector<DecodeTask>& tasks) {
  constexpr int64_t kEnoughTasks = 16, kMinTilesPerPart = 2;
  const PrefixAttnParams& params = plan.params;
  struct Span {
    int64_t begin, end, parts;
  };
  std::vector<Span> spans(params.batch);
  int64_t tiles = 0, parts = 0;
  for (int64_t b = 0; b < params.batch; ++b) {
    visible_tiles(plan, b, &spans[b].begin, &spans[b].end);
    tiles += spans[b].end - spans[b].begin;
  }
  const int64_t groups = ceil_div(params.heads_kv, plan.heads);
  const int64_t most = std::max(kMinTilesPerPart, ceil_div(tiles * groups, kEnoughTasks));
  for (Span& span : spans) {
    span.parts = std::max<int64_t>(1, ceil_div(span.end - span.begin, most));
    parts += span.parts;
  }
  if (parts * groups < kEnoughTasks) {
    const int64_t step = std::max<int64_t>(1, vector_lanes / plan.padded_rows);
    const int64_t wanted = ceil_div(kEnoughTasks, std::max<int64_t>(parts, 1));
    plan.heads = std::min(plan.heads, round_up(ceil_div(params.heads_kv, wanted), step));
    plan.lanes = round_up(plan.heads * plan.padded_rows, vector_lanes);
  }
  int64_t floats = 0;
  for (int64_t b = 0; b < params.batch; ++b)
    for (int64_t head0 = 0; head0 < params.heads_kv; head0 += plan.heads)
      for (int64_t part = 0; part < spans[b].parts; ++part) {
        const auto [begin, end, count] = spans[b];
        DecodeTask task{};
        task.b = b;
        task.head0 = head0;
        task.heads = std::min(plan.heads, params.heads_kv - head0);
        task.tile_begin = begin + (end - begin) * part / count;
        task.tile_end = begin + (end - begin) * (part + 1) / count;
        task.parts = count;
        tasks.push_back(task);
        if (count > 1) floats += plan.partial_floats(task.heads);
      }
  return floats;
}

}  // namespace internvl::cpu
