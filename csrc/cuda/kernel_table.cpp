#include "cuda/kernel_table.h"

#include "cuda/sm80/prefix_attn_bwd.h"
#include "cuda/sm80/prefix_attn_fwd.h"

namespace internvl {
namespace ptx {
struct Bf16;
struct Fp16;
}  // namespace ptx

namespace cuda {
namespace {

template <class T, int kHeadDim>
constexpr AttnKernels sm80_row(DType dtype) {
  return {"sm80",
          80,
          dtype,
          kHeadDim,
          &sm80::prefix_attn_fwd_workspace_bytes<T, kHeadDim>,
          &sm80::prefix_attn_fwd<T, kHeadDim>,
          &sm80::prefix_attn_bwd_workspace_bytes<T, kHeadDim>,
          &sm80::prefix_attn_bwd<T, kHeadDim>};
}

#define INTERNVL_BF16(head_dim) sm80_row<ptx::Bf16, head_dim>(DType::kBFloat16),
#define INTERNVL_FP16(head_dim) sm80_row<ptx::Fp16, head_dim>(DType::kFloat16),
const AttnKernels kAttnKernels[] = {
#include "kernel_rows.inc"
};
#undef INTERNVL_BF16
#undef INTERNVL_FP16

}  // namespace

const AttnKernels* find_attn_kernels(const PrefixAttnParams& params, const DeviceInfo& device,
                                     const char** reason) {
  *reason = nullptr;
  if (params.dtype == DType::kFloat32) {
    *reason = "the CUDA kernels take bf16 and fp16, not fp32 (the Triton backend takes fp32)";
    return nullptr;
  }
  if (device.compute_capability < kMinComputeCapability) {
    *reason = "the CUDA kernels need compute capability 8.0 or newer";
    return nullptr;
  }
  const AttnKernels* best = nullptr;
  for (const AttnKernels& row : kAttnKernels)
    if (row.dtype == params.dtype && row.head_dim >= params.head_dim &&
        device.compute_capability >= row.min_compute_capability &&
        (best == nullptr || row.head_dim < best->head_dim))
      best = &row;
  if (best == nullptr) *reason = "head_dim is larger than every compiled one (INTERNVL_HEAD_DIMS)";
  return best;
}

}  // namespace cuda
}  // namespace internvl
