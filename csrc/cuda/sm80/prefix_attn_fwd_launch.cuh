// Plan and launches of the forward of prefix_attn; included by the rendered instances and by the
// emulator.
#pragma once

#include <algorithm>

#include "cuda/prepass.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/sm80/prefix_attn_fwd.h"
#include "cuda/sm80/prefix_attn_fwd_kernel.cuh"

namespace internvl::sm80 {
namespace fwd {

constexpr int64_t kSectionBytes = 16 << 20;  // of K and V that blocks at work share in L2
constexpr int64_t kMaxBlocks = 0x7fffffff;   // of a grid

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
LaunchStatus prepare(cuda::Workspace& workspace, FwdPlan& plan, void* stream) {
  PrefixAttnParams& params = plan.params;
  LaunchStatus status = cuda::align_inputs(workspace, &params, stream);
  if (!status.ok()) return status;
  cuda::Prepass prepass;
  status = cuda::run_prepass(workspace, params, Traits::kBlockN,
                             cuda::may_prune(params, Traits::kBlockN), stream, &prepass);
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
  plan.out_aligned = cuda::rows_aligned(params.out, params.batch, params.seqlen_q, params.heads_q);
  return status;
}

}  // namespace fwd

template <class T, int kHeadDim>
int64_t prefix_attn_fwd_workspace_bytes(const PrefixAttnParams& params, const DeviceInfo&) {
  cuda::Workspace workspace;
  FwdPlan plan;
  plan.params = params;
  fwd::prepare<PrefixAttnFwdTraits<T, kHeadDim>>(workspace, plan, nullptr);
  return workspace.bytes();
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_fwd(const PrefixAttnParams& params, const DeviceInfo& device, void* memory,
                             void* stream) {
  using Traits = PrefixAttnFwdTraits<T, kHeadDim>;
  constexpr int kSharedBytes = sizeof(FwdShared<Traits>);
  if (device.max_shared_bytes < kSharedBytes)
    return {"prefix_attn: a block needs " + std::to_string(kSharedBytes) +
            " bytes of shared memory; the device allows " +
            std::to_string(device.max_shared_bytes)};
  const int64_t heads = params.batch * params.heads_q;
  if ((params.seqlen_q + Traits::kBlockM - 1) / Traits::kBlockM * heads > fwd::kMaxBlocks ||
      cuda::too_many_tiles(params, Traits::kBlockN))
    return {"prefix_attn: more tiles than a grid holds"};
  cuda::Workspace workspace(memory);
  FwdPlan plan;
  plan.params = params;
  const LaunchStatus status = fwd::prepare<Traits>(workspace, plan, stream);
  if (!status.ok()) return status;
  ptx::LaunchConfig config;
  config.name = "prefix_attn_fwd";
  config.grid.x = static_cast<unsigned>(plan.row_tiles) * static_cast<unsigned>(plan.heads);
  config.threads = Traits::kThreads;
  config.shared_bytes = kSharedBytes;
  config.stream = stream;
  return ptx::launch(prefix_attn_fwd_kernel<Traits>, config, plan);
}

}  // namespace internvl::sm80
