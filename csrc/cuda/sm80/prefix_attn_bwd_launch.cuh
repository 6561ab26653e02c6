// Plan and launches of the backward of prefix_attn; included by the rendered instances and by the
// emulator.
#pragma once

#include <algorithm>

#include "cuda/prepass.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/sm80/prefix_attn_bwd.h"
#include "cuda/sm80/prefix_attn_bwd_kv_kernel.cuh"
#include "cuda/sm80/prefix_attn_bwd_prepass.cuh"
#include "cuda/sm80/prefix_attn_bwd_q_kernel.cuh"

namespace internvl::sm80 {
namespace bwd {

constexpr int64_t kSectionBytes = 16 << 20;  // of streamed rows that blocks at work share in L2
constexpr int64_t kMaxItems = 0x7fffffff;    // of a grid, and of a block's list of tiles

inline int64_t tiles_of(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// Pairs of (batch, head) whose streamed side of `bytes` each is shared.
inline int64_t section(int64_t pairs, int64_t bytes) {
  return std::clamp<int64_t>(kSectionBytes / std::max<int64_t>(bytes, 1), 1,
                             std::max<int64_t>(pairs, 1));
}

inline bool whole_rows(const View& view, const PrefixAttnParams& params, int64_t seqlen,
                       int64_t heads) {
  return params.head_dim % 8 == 0 && cuda::rows_aligned(view, params.batch, seqlen, heads);
}

inline ptx::LaunchConfig config_of(const char* name, int64_t blocks, int threads, size_t shared,
                                   void* stream) {
  ptx::LaunchConfig config;
  config.name = name;
  config.grid.x = static_cast<unsigned>(blocks);
  config.threads = threads;
  config.shared_bytes = static_cast<int>(shared);
  config.stream = stream;
  return config;
}

// Sizes and working memory; launches the prepasses over keys unless the workspace only counts.
template <class Traits>
LaunchStatus prepare(cuda::Workspace& workspace, BwdArgs& args, void* stream) {
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
  args.scale_log2 = params.softmax_scale * tile::kLog2e;
  const int64_t q_bytes = params.seqlen_q * params.head_dim * 4;  // Q and dO of a head
  const int64_t kv_bytes = params.seqlen_k * params.head_dim * 4;
  args.section_kv = section(params.batch * params.heads_kv, q_bytes * params.group());
  args.section_q = section(heads, kv_bytes / params.group());
  args.aligned_out = whole_rows(params.out, params, params.seqlen_q, params.heads_q);
  args.aligned_dq = whole_rows(args.grads.dq, params, params.seqlen_q, params.heads_q);
  args.aligned_dk = whole_rows(args.grads.dk, params, params.seqlen_k, params.heads_kv);
  args.aligned_dv = whole_rows(args.grads.dv, params, params.seqlen_k, params.heads_kv);
  return status;
}

}  // namespace bwd

template <class T, int kHeadDim>
int64_t prefix_attn_bwd_workspace_bytes(const PrefixAttnParams& params,
                                        const PrefixAttnGrads& grads, const DeviceInfo&) {
  cuda::Workspace workspace;
  BwdArgs args;
  args.params = params;
  args.grads = grads;
  bwd::prepare<BwdTraits<T, kHeadDim>>(workspace, args, nullptr);
  return workspace.bytes();
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_bwd(const PrefixAttnParams& params, const PrefixAttnGrads& grads,
                             const DeviceInfo& device, void* memory, void* stream) {
  using Traits = BwdTraits<T, kHeadDim>;
  using bwd::config_of;
  constexpr size_t kKvBytes = sizeof(BwdKvShared<Traits>), kQBytes = sizeof(BwdQShared<Traits>);
  if (static_cast<size_t>(device.max_shared_bytes) < std::max(kKvBytes, kQBytes))
    return {"prefix_attn_backward: a block needs " + std::to_string(std::max(kKvBytes, kQBytes)) +
            " bytes of shared memory; the device allows " +
            std::to_string(device.max_shared_bytes)};
  const int64_t heads = params.batch * params.heads_q;
  const int64_t kv_blocks =
      bwd::tiles_of(params.seqlen_k, Traits::kBlockN) * params.batch * params.heads_kv;
  const int64_t row_blocks = bwd::tiles_of(params.seqlen_q, Traits::kBlockRows);
  const int64_t row_parts = row_blocks * Traits::kRowParts * heads;
  if (cuda::too_many_tiles(params, Traits::kBlockKeys) ||
      std::max({kv_blocks, row_parts,
                bwd::tiles_of(params.seqlen_q, Traits::kBlockM) * params.group()}) > bwd::kMaxItems)
    return {"prefix_attn_backward: more tiles than a grid holds"};

  cuda::Workspace workspace(memory);
  BwdArgs args;
  args.params = params;
  args.grads = grads;
  LaunchStatus status = bwd::prepare<Traits>(workspace, args, stream);
  if (status.ok())
    status = ptx::launch(
        bwd_rows_kernel<T, Traits::kBlockM>,
        config_of("prefix_attn_bwd_rows", row_parts, kRowThreads, sizeof(BwdRowsShared), stream),
        args);
  if (status.ok() && args.row_segments) {
    ptx::LaunchConfig config = config_of("prefix_attn_bwd_segments", args.row_tiles, 32, 0, stream);
    config.grid.y = static_cast<unsigned>(params.batch);
    status = ptx::launch(bwd_segments_kernel<Traits::kBlockM>, config, args);
  }
  if (status.ok())
    status = ptx::launch(
        prefix_attn_bwd_kv_kernel<Traits>,
        config_of("prefix_attn_bwd_kv", kv_blocks, Traits::kKvThreads, kKvBytes, stream), args);
  if (status.ok())
    status = ptx::launch(
        prefix_attn_bwd_q_kernel<Traits>,
        config_of("prefix_attn_bwd_q", row_blocks * heads, Traits::kQThreads, kQBytes, stream),
        args);
  if (status.ok() && params.alibi_slopes)
    status = ptx::launch(bwd_slopes_kernel<kSlopeThreads>,
                         config_of("prefix_attn_bwd_slopes", params.heads_q, kSlopeThreads,
                                   kSlopeThreads / 32 * 4, stream),
                         args, params.batch * row_blocks);
  return status;
}

}  // namespace internvl::sm80
