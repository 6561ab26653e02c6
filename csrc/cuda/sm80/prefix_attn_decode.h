// Launches of prefix_attn for few query rows, one pair of functions per compiled (dtype, head dim).
// Free of PyTorch and of CUDA; `stream` is a cudaStream_t.
#pragma once

#include "common/params.h"
#include "cuda/device_info.h"
#include "cuda/launch_status.h"

namespace internvl::sm80 {

// Bytes of working memory of a call: besides the prepasses', 4 * splits * (kHeadDim + 2) for each
// row of a tile, and a counter per tile.
template <class T, int kHeadDim>
int64_t prefix_attn_decode_workspace_bytes(const PrefixAttnParams& params,
                                           const DeviceInfo& device);

// Fills params.out and params.lse; head_dim is at most kHeadDim. `workspace` is 256-byte aligned.
template <class T, int kHeadDim>
LaunchStatus prefix_attn_decode(const PrefixAttnParams& params, const DeviceInfo& device,
                                void* workspace, void* stream);

}  // namespace internvl::sm80
