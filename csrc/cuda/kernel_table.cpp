#include "cuda/kernel_table.h"

#include <set>
#include <type_traits>

#include "cuda/sm80/prefix_attn_bwd.h"
#include "cuda/sm80/prefix_attn_decode.h"
#include "cuda/sm80/prefix_attn_fwd.h"
#include "cuda/sm90/prefix_attn_bwd.h"
#include "cuda/sm90/prefix_attn_decode.h"
#include "cuda/sm90/prefix_attn_fwd.h"

namespace internvl {
namespace ptx {
struct Bf16;
struct Fp16;
}  // namespace ptx

namespace cuda {
namespace {

template <class T>
constexpr DType kDType = std::is_same_v<T, ptx::Bf16> ? DType::kBFloat16 : DType::kFloat16;

// What the decode kernels serve instead of a forward: one token per sequence, or all query rows of
// a KV head fit one tile of 64 rows. Above, rows fill the forward's tiles and there are enough of
// them; it does not split the keys.
bool is_decode(const PrefixAttnParams& params) {
  return params.seqlen_q == 1 || params.seqlen_q * params.group() <= 64;
}

template <class T, int kHeadDim>
constexpr AttnKernels sm80_row() {
  return {"sm80",
          80,
          0,
          kDType<T>,
          kHeadDim,
          nullptr,
          &sm80::prefix_attn_fwd_workspace_bytes<T, kHeadDim>,
          &sm80::prefix_attn_fwd<T, kHeadDim>,
          &sm80::prefix_attn_bwd_workspace_bytes<T, kHeadDim>,
          &sm80::prefix_attn_bwd<T, kHeadDim>};
}

template <class T, int kHeadDim>
constexpr AttnKernels sm80_decode_row() {
  return {"sm80 decode",
          80,
          0,
          kDType<T>,
          kHeadDim,
          &is_decode,
          &sm80::prefix_attn_decode_workspace_bytes<T, kHeadDim>,
          &sm80::prefix_attn_decode<T, kHeadDim>,
          nullptr,
          nullptr};
}

template <class T, int kHeadDim>
constexpr AttnKernels sm90_row() {
  return {"sm90",
          90,
          90,
          kDType<T>,
          kHeadDim,
          nullptr,
          &sm90::prefix_attn_fwd_workspace_bytes<T, kHeadDim>,
          &sm90::prefix_attn_fwd<T, kHeadDim>,
          &sm90::prefix_attn_bwd_workspace_bytes<T, kHeadDim>,
          &sm90::prefix_attn_bwd<T, kHeadDim>};
}

template <class T, int kHeadDim>
constexpr AttnKernels sm90_decode_row() {
  return {"sm90 decode",
          90,
          90,
          kDType<T>,
          kHeadDim,
          &is_decode,
          &sm90::prefix_attn_decode_workspace_bytes<T, kHeadDim>,
          &sm90::prefix_attn_decode<T, kHeadDim>,
          nullptr,
          nullptr};
}

#define INTERNVL_SM80(T, head_dim) \
  sm80_row<ptx::T, head_dim>(), sm80_decode_row<ptx::T, head_dim>(),
#define INTERNVL_SM90(T, head_dim) \
  sm90_row<ptx::T, head_dim>(), sm90_decode_row<ptx::T, head_dim>(),
const AttnKernels kAttnKernels[] = {
#include "kernel_rows.inc"
};
#undef INTERNVL_SM80
#undef INTERNVL_SM90

bool runs_on(const AttnKernels& row, const DeviceInfo& device) {
  const int capability = device.compute_capability;
  return capability >= row.min_compute_capability &&
         (row.max_compute_capability == 0 || capability <= row.max_compute_capability);
}

bool better(const AttnKernels& row, const AttnKernels* best) {
  if (best == nullptr) return true;
  if ((row.takes != nullptr) != (best->takes != nullptr)) return row.takes != nullptr;
  if (row.min_compute_capability != best->min_compute_capability)
    return row.min_compute_capability > best->min_compute_capability;
  return row.head_dim < best->head_dim;
}

}  // namespace

const AttnKernels* find_attn_kernels(const PrefixAttnParams& params, const DeviceInfo& device,
                                     Pass pass, std::string* reason) {
  if (params.dtype == DType::kFloat32) {
    *reason = "dtype Float; the CUDA kernels take BFloat16 and Half (backend='triton' takes Float)";
    return nullptr;
  }
  const AttnKernels* best = nullptr;
  std::set<int> head_dims;
  for (const AttnKernels& row : kAttnKernels) {
    const bool has_pass = pass == Pass::kForward ? row.fwd != nullptr : row.bwd != nullptr;
    if (row.dtype != params.dtype || !has_pass || !runs_on(row, device)) continue;
    if (row.takes != nullptr && !row.takes(params)) continue;
    head_dims.insert(row.head_dim);
    if (row.head_dim >= params.head_dim && better(row, best)) best = &row;
  }
  if (best != nullptr) return best;
  std::string compiled;
  for (int head_dim : head_dims)
    compiled += (compiled.empty() ? "" : ", ") + std::to_string(head_dim);
  *reason = "head_dim is " + std::to_string(params.head_dim) + "; compiled: " + compiled +
            " (INTERNVL_HEAD_DIMS), each for itself and everything smaller";
  return nullptr;
}

}  // namespace cuda
}  // namespace internvl
