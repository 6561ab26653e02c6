// What a call's mask says about its keys, worked out once: which keys some query sees, and what the
// flags and segments of each key tile look like as a whole. Host code, free of PyTorch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/plan.h"

namespace internvl::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Which keys some query of batch row b sees. Invisible slots may hold anything; packing turns them
// into zeros.
inline void mark_used_keys(const KeyMask& mask, int64_t seqlen_q, uint8_t* used) {
  const int64_t p_lo = mask.first_position, p_hi = p_lo + seqlen_q - 1;
  const int64_t seqlen_k = mask.seqlen_k;
  std::fill(used, used + seqlen_k, uint8_t{0});
  if (seqlen_q == 0) return;
  const int64_t causal_begin = causal_key_begin(p_lo, mask.window);
  if (!mask.flags) {
    const auto mark = [&](int64_t begin, int64_t end) {
      begin = larger(begin, mask.start);
      end = smaller(end, mask.end);
      if (begin < end) std::fill(used + begin, used + end, uint8_t{1});
    };
    mark(0, mask.prefix_len);
    mark(causal_begin, visible_key_end(p_hi, 0, seqlen_k));
  } else {
    for (int64_t j = 0; j < seqlen_k; ++j) {
      const int flags = mask.flags[j];
      used[j] = flag_valid(flags) &&
                (flag_bidirectional(flags) || causal_reaches(p_lo, p_hi, j, j + 1, mask.window));
    }
  }
  if (!mask.segments) return;
  const QuerySegments own = query_segments(mask, p_lo, p_hi);
  for (int64_t j = 0; j < seqlen_k; ++j) {
    if (!used[j]) continue;
    const int32_t segment = mask.segments[j];
    bool found = false;
    if (own.any_inside && own.lo <= segment && segment <= own.hi) {
      const int flags = mask.flags ? mask.flags[j] : 0;
      const bool open =
          mask.flags ? flag_bidirectional(flags) : bidirectional_in_prefix(j, mask.prefix_len);
      const int64_t last = smaller(p_hi, seqlen_k - 1);
      for (int64_t p = larger(0, p_lo); p <= last && !found; ++p)
        found = mask.segments[p] == segment && (open || causal(p, j, mask.window));
    }
    used[j] = found;
  }
}

inline KeyTileSummary summarize(const KeyMask& mask, int64_t j_lo, int64_t j_hi) {
  KeyTileSummary summary;
  const int64_t end = smaller(j_hi, mask.seqlen_k);
  if (mask.flags) {
    bool any_valid = false, all_valid = j_hi <= mask.seqlen_k, any_open = false, all_open = true;
    for (int64_t j = j_lo; j < end; ++j) {
      const int flags = mask.flags[j];
      if (flag_valid(flags)) {
        any_valid = true;
        any_open |= flag_bidirectional(flags);
        all_open &= flag_bidirectional(flags);
      } else {
        all_valid = false;
      }
    }
    summary.any_valid = any_valid;
    summary.all_valid = all_valid;
    summary.any_bidirectional = any_open;
    summary.all_bidirectional = any_valid && all_open;
  }
  if (mask.segments) {
    const auto [lo, hi] = std::minmax_element(mask.segments + j_lo, mask.segments + end);
    summary.segment_lo = *lo;
    summary.segment_hi = *hi;
  }
  return summary;
}

// Owns what KeyTiles points to.
struct KeyTileData {
  std::vector<uint8_t> used;
  std::vector<KeyTileSummary> summaries;

  KeyTiles build(const PrefixAttnParams& params, int64_t block_n) {
    KeyTiles tiles;
    tiles.block_n = block_n;
    tiles.count = ceil_div(params.seqlen_k, block_n);
    used.resize(params.batch * params.seqlen_k);
    const bool summarized = params.key_flags || params.segment_ids;
    if (summarized) summaries.resize(params.batch * tiles.count);
    for (int64_t b = 0; b < params.batch; ++b) {
      const KeyMask mask = key_mask(params, b);
      mark_used_keys(mask, params.seqlen_q, used.data() + b * params.seqlen_k);
      for (int64_t tile = 0; summarized && tile < tiles.count; ++tile)
        summaries[b * tiles.count + tile] = summarize(mask, tile * block_n, (tile + 1) * block_n);
    }
    tiles.used = used.data();
    tiles.summaries = summarized ? summaries.data() : nullptr;
    return tiles;
  }
};

}  // namespace internvl::cpu
