// Launches of clip_qk_layernorm. Free of PyTorch and of CUDA; `stream` is a cudaStream_t.
#pragma once

#include "common/params.h"
#include "cuda/device_info.h"
#include "cuda/launch_status.h"

namespace internvl::sm80 {

// Fills params.q, k, v and statistics.
LaunchStatus clip_qk_layernorm_fwd(const ClipQkLayernormParams& params, const DeviceInfo& device,
                                   void* stream);

// Bytes of working memory of clip_qk_layernorm_bwd, for the same arguments.
int64_t clip_qk_layernorm_bwd_workspace_bytes(const ClipQkLayernormParams& params,
                                              const ClipQkLayernormGrads& grads,
                                              const DeviceInfo& device);

// Fills grads.grad_qkv and the gradients of the parameters that are there. params.statistics holds
// what the forward saved.
LaunchStatus clip_qk_layernorm_bwd(const ClipQkLayernormParams& params,
                                   const ClipQkLayernormGrads& grads, const DeviceInfo& device,
                                   void* workspace, void* stream);

}  // namespace internvl::sm80
