// The support matrix of the attention kernels: (architecture, dtype, head dim) -> launch functions.
// The rows come from INTERNVL_HEAD_DIMS (CMakeLists.txt renders one instance file per architecture,
// operator, dtype and head dim).
//
// Which row serves a call, forward and backward each for itself: of those that run on the device,
// take the call's shape and dtype and hold the head dim (padded with zeros on the way into shared
// memory), the ones made for such shapes, then the ones of the newest architecture, and of these
// the smallest head dim.
#pragma once

#include <cstdint>
#include <string>

#include "common/params.h"
#include "cuda/device_info.h"
#include "cuda/launch_status.h"

namespace internvl::cuda {

constexpr int kMinComputeCapability = 80;

enum class Pass { kForward, kBackward };

// Each pair: bytes of working memory, launch; null: the row has no such kernel. `workspace` is
// 256-byte aligned.
struct AttnKernels {
  const char* arch;
  int min_compute_capability;
  int max_compute_capability;  // 0: none
  DType dtype;
  int head_dim;
  bool (*takes)(const PrefixAttnParams&);  // which shapes the row is made for; null: any
  int64_t (*fwd_bytes)(const PrefixAttnParams&, const DeviceInfo&);
  LaunchStatus (*fwd)(const PrefixAttnParams&, const DeviceInfo&, void* workspace, void* stream);
  int64_t (*bwd_bytes)(const PrefixAttnParams&, const PrefixAttnGrads&, const DeviceInfo&);
  LaunchStatus (*bwd)(const PrefixAttnParams&, const PrefixAttnGrads&, const DeviceInfo&,
                      void* workspace, void* stream);
};

// The kernels for a call, or null; `reason` then says why.
const AttnKernels* find_attn_kernels(const PrefixAttnParams& params, const DeviceInfo& device,
                                     Pass pass, std::string* reason);

}  // namespace internvl::cuda
