// Launches of the backward of prefix_attn, one pair of functions per compiled (dtype, head dim).
// Free of PyTorch and of CUDA; `stream` is a cudaStream_t.
#pragma once

#include "common/params.h"
#include "cuda/device_info.h"
#include "cuda/launch_status.h"

namespace internvl::sm90 {

// Bytes of working memory of a call: O(seqlen_q + seqlen_k).
template <class T, int kHeadDim>
int64_t prefix_attn_bwd_workspace_bytes(const PrefixAttnParams& params,
                                        const PrefixAttnGrads& grads, const DeviceInfo& device);

// Fills grads.dq, dk, dv and, with slopes, dalibi_slopes. params.out and params.lse hold what the
// forward returned; head_dim is at most kHeadDim. `workspace` is 256-byte aligned.
template <class T, int kHeadDim>
LaunchStatus prefix_attn_bwd(const PrefixAttnParams& params, const PrefixAttnGrads& grads,
                             const DeviceInfo& device, void* workspace, void* stream);

}  // namespace internvl::sm90
