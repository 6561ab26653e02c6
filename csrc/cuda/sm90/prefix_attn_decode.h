// Launches of prefix_attn for few query rows on compute capability 9.0, one pair of functions per
// compiled (dtype, head dim). Free of PyTorch and of CUDA; `stream` is a cudaStream_t.
#pragma once

#include "common/params.h"
#include "cuda/device_info.h"
#include "cuda/launch_status.h"

namespace internvl::sm90 {

// Bytes of working memory of a call: besides the prepasses' (and copies of tensors that no tensor
// map fits), 4 * splits * (kHeadDim + 2) for each row of a tile, and a counter per tile.
template <class T, int kHeadDim>
int64_t prefix_attn_decode_workspace_bytes(const PrefixAttnParams& params,
                                           const DeviceInfo& device);

// Fills params.out and params.lse; head_dim is at most kHeadDim. `workspace` is 256-byte aligned.
template <class T, int kHeadDim>
LaunchStatus prefix_attn_decode(const PrefixAttnParams& params, const DeviceInfo& device,
                                void* workspace, void* stream);

}  // namespace internvl::sm90
