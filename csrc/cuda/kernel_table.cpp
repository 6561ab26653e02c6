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
                                     std::string* reason) {
  if (params.dtype == DType::kFloat32) {
    *reason = "dtype Float; the CUDA kernels take BFloat16 and Half (backend='triton' takes Float)";
    return nullptr;
  }
  const AttnKernels* best = nullptr;
  std::string head_dims;
  for (const AttnKernels& row : kAttnKernels) {
    if (row.dtype != params.dtype || device.compute_capability < row.min_compute_capability)
      continue;
    head_dims += (head_dims.empty() ? "" : ", ") + std::to_string(row.head_dim);
    if (row.head_dim >= params.head_dim && (best == nullptr || row.head_dim < best->head_dim))
      best = &row;
  }
  if (best == nullptr)
    *reason = "head_dim is " + std::to_string(params.head_dim) + "; compiled: " + head_dims +
              " (INTERNVL_HEAD_DIMS), each for itself and everything smaller";
  return best;
}

}  // namespace cuda
}  // namespace internvl
