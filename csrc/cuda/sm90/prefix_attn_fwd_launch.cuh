// Plan and launch of the sm90 forward of prefix_attn; included by the rendered instances and by the
// emulator.
#pragma once

#include "cuda/attn_fwd_plan.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/sm90/key_maps.cuh"
#include "cuda/sm90/prefix_attn_fwd.h"
#include "cuda/sm90/prefix_attn_fwd_kernel.cuh"

namespace internvl::sm90 {
namespace fwd {

// Launches nothing while the workspace only counts.
template <class Traits>
LaunchStatus prepare(cuda::Workspace& workspace, FwdPlan& plan, void* stream) {
  LaunchStatus status;
  if (plan.params.seqlen_k > 0) status = copy_unmapped<Traits>(workspace, plan.params, stream);
  return status.ok() ? cuda::plan_fwd<Traits>(workspace, plan, stream) : status;
}

template <class Traits>
LaunchStatus encode_maps(FwdPlan& plan) {
  const PrefixAttnParams& params = plan.params;
  LaunchStatus status;
  if (params.seqlen_k > 0) status = encode_keys<Traits>(params, &plan.k, &plan.v);
  const auto shape =
      map_shape<typename Traits::QTile>(params, params.out, params.seqlen_q, params.heads_q, 64);
  plan.out_mapped = plan.pack == 1 && ptx::tensor_map_error(params.out.data, shape).empty();
  if (status.ok() && plan.out_mapped)
    status = ptx::encode_tensor_map(params.out.data, shape, &plan.out);
  return status;
}

// One block per multiprocessor, each with its share of the query tiles, where they cost what their
// place in the order says. Else one per tile: hardware deals them out as blocks become free.
template <class Traits>
unsigned blocks_of(const FwdPlan& plan, const DeviceInfo& device) {
  const PrefixAttnParams& params = plan.params;
  const auto tiles = static_cast<unsigned>(plan.row_tiles) * static_cast<unsigned>(plan.heads);
  const bool known =
      !params.key_range && !params.key_flags && !params.segment_ids && plan.key_norms == nullptr;
  if (Traits::kQTiles == 1 || !known) return tiles;
  return std::min(tiles, static_cast<unsigned>(device.multiprocessors));
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
  static_assert(kSharedBytes <= 227 * 1024, "what a block of compute capability 9.0 may have");
  if (device.max_shared_bytes < kSharedBytes)
    return {"prefix_attn: a block needs " + std::to_string(kSharedBytes) +
            " bytes of shared memory; the device allows " +
            std::to_string(device.max_shared_bytes)};
  if (cuda::fwd_too_large<Traits>(params)) return {"prefix_attn: more tiles than a grid holds"};
  cuda::Workspace workspace(memory);
  FwdPlan plan;
  plan.params = params;
  LaunchStatus status = fwd::prepare<Traits>(workspace, plan, stream);
  if (status.ok()) status = fwd::encode_maps<Traits>(plan);
  if (!status.ok()) return status;
  ptx::LaunchConfig config;
  config.name = "prefix_attn_fwd";
  config.grid.x = fwd::blocks_of<Traits>(plan, device);
  config.threads = Traits::kThreads;
  config.shared_bytes = kSharedBytes;
  config.stream = stream;
  return ptx::launch(prefix_attn_fwd_kernel<Traits>, config, plan);
}

}  // namespace internvl::sm90
