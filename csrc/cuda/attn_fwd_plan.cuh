// What the host decides about a forward, whichever kernel runs it.
#pragma once

#include <algorithm>

#include "cuda/prepass.h"
#include "cuda/tile/attn_fwd_schedule.cuh"

namespace internvl::cuda {

constexpr int64_t kSectionBytes = 16 << 20;    // of K and V that blocks at work share in L2
constexpr int64_t kMaxFwdBlocks = 0x7fffffff;  // of a grid

// Filled part of the row tiles when rows of `pack` heads follow one another.
inline double filled(int64_t rows, int64_t block_m) {
  return static_cast<double>(rows) / ((rows + block_m - 1) / block_m * block_m);
}

// The heads of a group share query tiles where that wastes clearly fewer rows.
inline int pack_of(const PrefixAttnParams& params, int64_t block_m) {
  const int64_t group = params.heads_q / params.heads_kv;
  const double alone = filled(params.seqlen_q, block_m);
  return static_cast<int>(alone < 0.9 * filled(params.seqlen_q * group, block_m) ? group : 1);
}

// The aligned views, the prepasses and the sizes; launches nothing while the workspace only counts.
template <class Traits>
LaunchStatus plan_fwd(Workspace& workspace, tile::FwdPlan& plan, void* stream) {
  PrefixAttnParams& params = plan.params;
  LaunchStatus status = align_inputs(workspace, &params, stream);
  if (!status.ok()) return status;
  Prepass prepass;
  status = run_prepass(workspace, params, Traits::kBlockN, may_prune(params, Traits::kBlockN),
                       stream, &prepass);
  plan.summaries = {static_cast<const ptx::U32x4*>(prepass.tiles), prepass.used};
  plan.key_norms = prepass.key_norms;
  plan.prune_threshold = prepass.prune_threshold;
  plan.tile_count = static_cast<int>(prepass.tile_count);
  plan.pack = pack_of(params, Traits::kBlockM);
  const int64_t rows = params.seqlen_q * plan.pack;
  plan.row_tiles = static_cast<int>((rows + Traits::kBlockM - 1) / Traits::kBlockM);
  plan.heads = static_cast<int>(params.batch * params.heads_q / plan.pack);
  const int64_t kv_bytes = std::max<int64_t>(params.seqlen_k, 1) * params.head_dim * 4;
  const int64_t sharing = params.heads_q / params.heads_kv / plan.pack;  // blocks per KV head
  plan.heads_per_section =
      static_cast<int>(std::clamp<int64_t>(std::max<int64_t>(kSectionBytes / kv_bytes, 1) * sharing,
                                           1, std::max<int64_t>(plan.heads, 1)));
  plan.out_aligned = rows_aligned(params.out, params.batch, params.seqlen_q, params.heads_q);
  return status;
}

template <class Traits>
bool fwd_too_large(const PrefixAttnParams& params) {
  const int64_t heads = params.batch * params.heads_q;
  return (params.seqlen_q + Traits::kBlockM - 1) / Traits::kBlockM * heads > kMaxFwdBlocks ||
         too_many_tiles(params, Traits::kBlockN);
}

}  // namespace internvl::cuda
