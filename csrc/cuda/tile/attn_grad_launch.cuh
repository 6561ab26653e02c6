// The launches around the two big kernels of a backward, and the working memory of a call.
#pragma once

#include <algorithm>

#include "cuda/prepass.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/tile/attn_grad_prepass.cuh"

namespace internvl::tile {

constexpr int64_t kSectionBytes = 16 << 20;   // of streamed rows that blocks at work share in L2
constexpr int64_t kMaxBwdItems = 0x7fffffff;  // of a grid, and of a block's list of tiles

inline int64_t tiles_of(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// Pairs of (batch, head) whose streamed side of `bytes` each is shared.
inline int64_t bwd_section(int64_t pairs, int64_t bytes) {
  return std::clamp<int64_t>(kSectionBytes / std::max<int64_t>(bytes, 1), 1,
                             std::max<int64_t>(pairs, 1));
}

inline bool whole_rows(const View& view, const PrefixAttnParams& params, int64_t seqlen,
                       int64_t heads) {
  return params.head_dim % 8 == 0 && cuda::rows_aligned(view, params.batch, seqlen, heads);
}

inline ptx::LaunchConfig bwd_config(const char* name, int64_t blocks, int threads, size_t shared,
                                    void* stream) {
  ptx::LaunchConfig config;
  config.name = name;
  config.grid.x = static_cast<unsigned>(blocks);
  config.threads = threads;
  config.shared_bytes = static_cast<int>(shared);
  config.stream = stream;
  return config;
}

// Sizes and working memory; aligns the inputs and launches the prepasses over keys, unless the
// workspace only counts.
template <class Traits>
LaunchStatus bwd_prepare(cuda::Workspace& workspace, BwdArgs& args, void* stream) {
  PrefixAttnParams& params = args.params;
  const int64_t heads = params.batch * params.heads_q;
  LaunchStatus status = cuda::align_inputs(workspace, &params, stream);
  if (status.ok())
    status = cuda::align_rows(workspace, &args.grads.grad_out, params.batch, params.seqlen_q,
                              params.heads_q, params.head_dim, stream);
  if (!status.ok()) return status;

  const bool prune = cuda::may_prune(params, Traits::kBlockKeys);
  cuda::Prepass prepass;
  status = cuda::run_prepass(workspace, params, Traits::kBlockKeys, prune, stream, &prepass);
  args.keys = {static_cast<const ptx::U32x4*>(prepass.tiles), prepass.used};
  args.key_tiles = prepass.tile_count;
  args.key_norms = prepass.key_norms;
  args.prune_threshold = prepass.prune_threshold;

  const int64_t row_blocks = tiles_of(params.seqlen_q, Traits::kBlockRows);
  args.row_tiles = tiles_of(params.seqlen_q, Traits::kBlockM);
  args.padded_rows = row_blocks * Traits::kBlockRows;
  args.lse_log2 = workspace.take<float>(heads * args.padded_rows);
  args.delta = workspace.take<float>(heads * args.padded_rows);
  if (params.segment_ids)
    args.row_segments = workspace.take<ptx::U32x4>(params.batch * args.row_tiles);
  if (prune) args.row_norms = workspace.take<ptx::F32x2>(heads * args.row_tiles);
  if (params.alibi_slopes) args.slope_sums = workspace.take<float>(heads * row_blocks);

  args.group = params.group();
  args.scale_log2 = params.softmax_scale * kLog2e;
  const int64_t q_bytes = params.seqlen_q * params.head_dim * 4;  // Q and dO of a head
  const int64_t kv_bytes = params.seqlen_k * params.head_dim * 4;
  args.section_kv = bwd_section(params.batch * params.heads_kv, q_bytes * params.group());
  args.section_q = bwd_section(heads, kv_bytes / params.group());
  args.aligned_out = whole_rows(params.out, params, params.seqlen_q, params.heads_q);
  args.aligned_dq = whole_rows(args.grads.dq, params, params.seqlen_q, params.heads_q);
  args.aligned_dk = whole_rows(args.grads.dk, params, params.seqlen_k, params.heads_kv);
  args.aligned_dv = whole_rows(args.grads.dv, params, params.seqlen_k, params.heads_kv);
  return status;
}

// More tiles than a grid or a block's list holds: what is wrong, else empty.
template <class Traits>
std::string bwd_size_error(const PrefixAttnParams& params) {
  const int64_t heads = params.batch * params.heads_q;
  const int64_t kv_blocks =
      tiles_of(params.seqlen_k, Traits::kBlockN) * params.batch * params.heads_kv;
  const int64_t row_parts = tiles_of(params.seqlen_q, Traits::kBlockRows) * Traits::kRowParts;
  const int64_t row_items = tiles_of(params.seqlen_q, Traits::kBlockM) * params.group();
  const bool fits = !cuda::too_many_tiles(params, Traits::kBlockKeys) &&
                    std::max({kv_blocks, row_parts * heads, row_items}) <= kMaxBwdItems;
  return fits ? "" : "prefix_attn_backward: more tiles than a grid holds";
}

// Before the big kernels: lse, delta, norms and segments of the query rows.
template <class Traits>
LaunchStatus bwd_launch_rows(const BwdArgs& args, void* stream) {
  const PrefixAttnParams& params = args.params;
  const int64_t parts = args.padded_rows / Traits::kBlockM * params.batch * params.heads_q;
  LaunchStatus status = ptx::launch(
      bwd_rows_kernel<Traits>,
      bwd_config("prefix_attn_bwd_rows", parts, kRowThreads, sizeof(BwdRowsShared), stream), args);
  if (!status.ok() || !args.row_segments) return status;
  return ptx::launch(
      bwd_segments_kernel<Traits>,
      bwd_config("prefix_attn_bwd_segments", args.row_tiles * params.batch, 32, 0, stream), args);
}

// After them: dalibi_slopes, where there are slopes.
template <class Traits>
LaunchStatus bwd_launch_slopes(const BwdArgs& args, void* stream) {
  const PrefixAttnParams& params = args.params;
  if (!params.alibi_slopes) return {};
  return ptx::launch(bwd_slopes_kernel<Traits>,
                     bwd_config("prefix_attn_bwd_slopes", params.heads_q, kSlopeThreads,
                                kSlopeThreads / 32 * 4, stream),
                     args, params.batch * tiles_of(params.seqlen_q, Traits::kBlockRows));
}

}  // namespace internvl::tile
