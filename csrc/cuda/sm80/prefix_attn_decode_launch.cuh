// Plan and launches of prefix_attn for few query rows; included by the rendered instances and by
// the emulator.
#pragma once

#include "cuda/attn_decode_plan.cuh"
#include "cuda/sm80/prefix_attn_decode.h"
#include "cuda/sm80/prefix_attn_decode_kernel.cuh"

namespace internvl::sm80 {

template <class T, int kHeadDim>
int64_t prefix_attn_decode_workspace_bytes(const PrefixAttnParams& params,
                                           const DeviceInfo& device) {
  cuda::Workspace workspace;
  DecodePlan plan;
  plan.fwd.params = params;
  cuda::plan_decode<PrefixAttnDecodeTraits<T, kHeadDim>>(workspace, plan, device, nullptr);
  return workspace.bytes();
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_decode(const PrefixAttnParams& params, const DeviceInfo& device,
                                void* memory, void* stream) {
  using Traits = PrefixAttnDecodeTraits<T, kHeadDim>;
  constexpr int kSharedBytes = sizeof(DecodeShared<Traits>);
  const std::string error = cuda::decode_error<Traits>(params, device, kSharedBytes);
  if (!error.empty()) return {error};
  cuda::Workspace workspace(memory);
  DecodePlan plan;
  plan.fwd.params = params;
  const LaunchStatus status = cuda::plan_decode<Traits>(workspace, plan, device, stream);
  if (!status.ok()) return status;
  const int64_t rows = cuda::decode_rows(params);
  plan.row_warps = rows <= 16 ? 1 : rows <= 32 ? 2 : Traits::kBlockM / 16;
  return ptx::launch(prefix_attn_decode_kernel<Traits>,
                     cuda::decode_config(plan, Traits::kThreads, kSharedBytes, stream), plan);
}

}  // namespace internvl::sm80
