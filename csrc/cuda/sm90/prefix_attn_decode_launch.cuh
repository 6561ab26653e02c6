// Plan and launch of the sm90 decode kernel; included by the rendered instances and by the
// emulator.
#pragma once

#include "cuda/attn_decode_plan.cuh"
#include "cuda/sm90/key_maps.cuh"
#include "cuda/sm90/prefix_attn_decode.h"
#include "cuda/sm90/prefix_attn_decode_kernel.cuh"

namespace internvl::sm90 {
namespace decode {

// Launches nothing while the workspace only counts.
template <class Traits>
LaunchStatus prepare(cuda::Workspace& workspace, DecodePlan& plan, const DeviceInfo& device,
                     void* stream) {
  PrefixAttnParams& params = plan.fwd.params;
  LaunchStatus status;
  if (params.seqlen_k > 0) status = copy_unmapped<Traits>(workspace, params, stream);
  return status.ok() ? cuda::plan_decode<Traits>(workspace, plan, device, stream) : status;
}

template <class Traits>
LaunchStatus launch(const PrefixAttnParams& params, const DeviceInfo& device, void* memory,
                    void* stream) {
  constexpr int kSharedBytes = sizeof(DecodeShared<Traits>);
  static_assert(kSharedBytes <= Traits::kMostBytes, "what a multiprocessor has for a block");
  const std::string error = cuda::decode_error<Traits>(params, device, kSharedBytes);
  if (!error.empty()) return {error};
  cuda::Workspace workspace(memory);
  DecodePlan plan;
  plan.fwd.params = params;
  LaunchStatus status = prepare<Traits>(workspace, plan, device, stream);
  if (status.ok() && params.seqlen_k > 0)
    status = encode_keys<Traits>(plan.fwd.params, &plan.k, &plan.v);
  if (!status.ok()) return status;
  return ptx::launch(prefix_attn_decode_kernel<Traits>,
                     cuda::decode_config(plan, Traits::kThreads, kSharedBytes, stream), plan);
}

}  // namespace decode

template <class T, int kHeadDim>
int64_t prefix_attn_decode_workspace_bytes(const PrefixAttnParams& params,
                                           const DeviceInfo& device) {
  return with_decode_traits<T, kHeadDim>(cuda::decode_rows(params), [&](auto traits) {
    cuda::Workspace workspace;
    DecodePlan plan;
    plan.fwd.params = params;
    decode::prepare<decltype(traits)>(workspace, plan, device, nullptr);
    return workspace.bytes();
  });
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_decode(const PrefixAttnParams& params, const DeviceInfo& device,
                                void* memory, void* stream) {
  return with_decode_traits<T, kHeadDim>(cuda::decode_rows(params), [&](auto traits) {
    return decode::launch<decltype(traits)>(params, device, memory, stream);
  });
}

}  // namespace internvl::sm90
