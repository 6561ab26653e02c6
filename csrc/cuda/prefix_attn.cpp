// CUDA registration of prefix_attn: check, outputs, table lookup, launch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/kernel_table.h"
#include "cuda/torch_call.h"

namespace internvl::cuda {
namespace {

using torch::headeronly::ScalarType;

const AttnKernels& kernels_for(const PrefixAttnParams& params, const DeviceInfo& device) {
  std::string reason;
  const AttnKernels* row = find_attn_kernels(params, device, &reason);
  if (!row) throw std::invalid_argument("prefix_attn: " + reason);
  return *row;
}

std::tuple<Tensor, Tensor> prefix_attn(Tensor q, Tensor k, Tensor v, OptionalTensor prefix_len,
                                       OptionalTensor key_range, OptionalTensor query_start,
                                       OptionalTensor key_flags, OptionalTensor segment_ids,
                                       OptionalTensor alibi_slopes,
                                       std::optional<double> softmax_scale, int64_t window) {
  Call call(q);
  PrefixAttnTensors tensors{q,           k,         v,           prefix_len,  key_range,
                            query_start, key_flags, segment_ids, alibi_slopes};
  PrefixAttnParams params = check_prefix_attn(tensors, softmax_scale, window);
  const AttnKernels& kernels = kernels_for(params, call.device());
  Tensor out =
      torch::stable::new_empty(q, {params.batch, params.seqlen_q, params.heads_q, params.head_dim});
  Tensor lse = torch::stable::new_empty(q, {params.batch, params.heads_q, params.seqlen_q},
                                        ScalarType::Float);
  params.out = view_of(out);
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (lse.numel() == 0) return {out, lse};
  void* workspace = call.workspace(kernels.fwd_bytes(params, call.device()));
  raise(kernels.fwd(params, call.device(), workspace, call.stream()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_attn_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor prefix_len, OptionalTensor key_range, OptionalTensor query_start,
    OptionalTensor key_flags, OptionalTensor segment_ids, OptionalTensor alibi_slopes,
    std::optional<double> softmax_scale, int64_t window) {
  constexpr const char* kOp = "prefix_attn_backward";
  Call call(q);
  PrefixAttnTensors tensors{q,           k,         v,           prefix_len,  key_range,
                            query_start, key_flags, segment_ids, alibi_slopes};
  PrefixAttnParams params = check_prefix_attn(tensors, softmax_scale, window);
  const AttnKernels& kernels = kernels_for(params, call.device());
  PrefixAttnGrads grads;
  grads.grad_out = check_like(kOp, "grad_out", grad_out, q);
  params.out = check_like(kOp, "out", out, q);
  lse = check_lse(kOp, "lse", lse, q);
  params.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  if (grad_lse) {
    grad_lse = check_lse(kOp, "grad_lse", *grad_lse, q);
    grads.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
  }
  const auto like = [](const Tensor& t) {
    return torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  Tensor dslopes =
      torch::stable::new_empty(q, {alibi_slopes ? params.heads_q : 0}, ScalarType::Float);
  grads.dq = view_of(dq);
  grads.dk = view_of(dk);
  grads.dv = view_of(dv);
  grads.dalibi_slopes = alibi_slopes ? static_cast<float*>(dslopes.mutable_data_ptr()) : nullptr;
  void* workspace = call.workspace(kernels.bwd_bytes(params, grads, call.device()));
  raise(kernels.bwd(params, grads, call.device(), workspace, call.stream()));
  return {dq, dk, dv, dslopes};
}

}  // namespace
}  // namespace internvl::cuda

STABLE_TORCH_LIBRARY_IMPL(internvl, CUDA, m) {
  m.impl("prefix_attn", TORCH_BOX(&internvl::cuda::prefix_attn));
  m.impl("prefix_attn_backward", TORCH_BOX(&internvl::cuda::prefix_attn_backward));
}
