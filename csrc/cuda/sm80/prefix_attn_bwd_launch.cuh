// Plan and launches of the backward of prefix_attn; included by the rendered instances and by the
// emulator.
#pragma once

#include "cuda/sm80/prefix_attn_bwd.h"
#include "cuda/sm80/prefix_attn_bwd_kv_kernel.cuh"
#include "cuda/sm80/prefix_attn_bwd_q_kernel.cuh"
#include "cuda/tile/attn_grad_launch.cuh"

namespace internvl::sm80 {

template <class Traits>
constexpr size_t kBwdSharedBytes =
    std::max(sizeof(BwdKvShared<Traits>), sizeof(BwdQShared<Traits>));

// Calls with(traits) with the tiles that the device has the shared memory for; the usual ones
// where it has it for neither.
template <class T, int kHeadDim, class With>
auto with_bwd_tiles(const DeviceInfo& device, With with) {
  using Usual = BwdTraits<T, kHeadDim>;
  if constexpr (kHeadDim == 128) {
    using Small = BwdTraits<T, kHeadDim, true>;
    static_assert(kBwdSharedBytes<Small> <= 99 * 1024, "what a block of 8.6, 8.9 and 12.0 gets");
    if (static_cast<size_t>(device.max_shared_bytes) < kBwdSharedBytes<Usual>) return with(Small{});
  }
  return with(Usual{});
}

template <class T, int kHeadDim>
int64_t prefix_attn_bwd_workspace_bytes(const PrefixAttnParams& params,
                                        const PrefixAttnGrads& grads, const DeviceInfo& device) {
  return with_bwd_tiles<T, kHeadDim>(device, [&](auto traits) {
    cuda::Workspace workspace;
    BwdArgs args;
    args.params = params;
    args.grads = grads;
    tile::bwd_prepare<decltype(traits)>(workspace, args, nullptr);
    return workspace.bytes();
  });
}

template <class Traits>
LaunchStatus launch_bwd(const PrefixAttnParams& params, const PrefixAttnGrads& grads,
                        const DeviceInfo& device, void* memory, void* stream) {
  constexpr size_t kKvBytes = sizeof(BwdKvShared<Traits>), kQBytes = sizeof(BwdQShared<Traits>);
  if (static_cast<size_t>(device.max_shared_bytes) < kBwdSharedBytes<Traits>)
    return {"prefix_attn_backward: a block needs " + std::to_string(kBwdSharedBytes<Traits>) +
            " bytes of shared memory; the device allows " +
            std::to_string(device.max_shared_bytes) + " (backend='triton' may need less)"};
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

template <class T, int kHeadDim>
LaunchStatus prefix_attn_bwd(const PrefixAttnParams& params, const PrefixAttnGrads& grads,
                             const DeviceInfo& device, void* memory, void* stream) {
  return with_bwd_tiles<T, kHeadDim>(device, [&](auto traits) {
    return launch_bwd<decltype(traits)>(params, grads, device, memory, stream);
  });
}

}  // namespace internvl::sm80
