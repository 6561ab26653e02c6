// Plan and launches of the forward of prefix_attn; included by the rendered instances and by the
// emulator.
#pragma once

#include "cuda/attn_fwd_plan.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/sm80/prefix_attn_fwd.h"
#include "cuda/sm80/prefix_attn_fwd_kernel.cuh"

namespace internvl::sm80 {
template <class T, int kHeadDim>
int64_t prefix_attn_fwd_workspace_bytes(const PrefixAttnParams& params, const DeviceInfo&) {
  cuda::Workspace workspace;
  FwdPlan plan;
  plan.params = params;
  cuda::plan_fwd<PrefixAttnFwdTraits<T, kHeadDim>>(workspace, plan, nullptr);
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
  if (cuda::fwd_too_large<Traits>(params)) return {"prefix_attn: more tiles than a grid holds"};
  cuda::Workspace workspace(memory);
  FwdPlan plan;
  plan.params = params;
  const LaunchStatus status = cuda::plan_fwd<Traits>(workspace, plan, stream);
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
