// Plan and launches of the backward of prefix_attn; included by the rendered instances and by the
// emulator.
#pragma once

#include "cuda/sm80/prefix_attn_bwd.h"
#include "cuda/sm80/prefix_attn_bwd_kv_kernel.cuh"
#include "cuda/sm80/prefix_attn_bwd_q_kernel.cuh"
#include "cuda/tile/attn_grad_launch.cuh"

namespace internvl::sm80 {

template <class T, int kHeadDim>
int64_t prefix_attn_bwd_workspace_bytes(const PrefixAttnParams& params,
                                        const PrefixAttnGrads& grads, const DeviceInfo&) {
  cuda::Workspace workspace;
  BwdArgs args;
  args.params = params;
  args.grads = grads;
  tile::bwd_prepare<BwdTraits<T, kHeadDim>>(workspace, args, nullptr);
  return workspace.bytes();
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_bwd(const PrefixAttnParams& params, const PrefixAttnGrads& grads,
                             const DeviceInfo& device, void* memory, void* stream) {
  using Traits = BwdTraits<T, kHeadDim>;
  constexpr size_t kKvBytes = sizeof(BwdKvShared<Traits>), kQBytes = sizeof(BwdQShared<Traits>);
  if (static_cast<size_t>(device.max_shared_bytes) < std::max(kKvBytes, kQBytes))
    return {"prefix_attn_backward: a block needs " + std::to_string(std::max(kKvBytes, kQBytes)) +
            " bytes of shared memory; the device allows " +
            std::to_string(device.max_shared_bytes)};
  const std::string error = tile::bwd_size_error<Traits>(params);
  if (!error.empty()) return {error};

  cuda::Workspace workspace(memory);
  BwdArgs args;
  args.params = params;
  args.grads = grads;
  const int64_t kv_blocks =
      tile::tiles_of(params.seqlen_k, Traits::kBlockN) * params.batch * params.heads_kv;
  const int64_t q_blocks =
      tile::tiles_of(params.seqlen_q, Traits::kBlockRows) * params.batch * params.heads_q;
  LaunchStatus status = tile::bwd_prepare<Traits>(workspace, args, stream);
  if (status.ok()) status = tile::bwd_launch_rows<Traits>(args, stream);
  if (status.ok())
    status = ptx::launch(
        prefix_attn_bwd_kv_kernel<Traits>,
        tile::bwd_config("prefix_attn_bwd_kv", kv_blocks, Traits::kKvThreads, kKvBytes, stream),
        args);
  if (status.ok())
    status = ptx::launch(
        prefix_attn_bwd_q_kernel<Traits>,
        tile::bwd_config("prefix_attn_bwd_q", q_blocks, Traits::kQThreads, kQBytes, stream), args);
  return status.ok() ? tile::bwd_launch_slopes<Traits>(args, stream) : status;
}

}  // namespace internvl::sm80
