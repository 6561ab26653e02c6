// CUDA registration of prefix_attn: check, outputs, table lookup, launch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/kernel_table.h"
#include "cuda/torch_call.h"

namespace internvl::cuda {
namespace {

const AttnKernels& kernels_for(const PrefixAttnParams& params, const DeviceInfo& device,
                               Pass pass) {
  std::string reason;
  const AttnKernels* row = find_attn_kernels(params, device, pass, &reason);
  if (!row) throw std::invalid_argument("prefix_attn: " + reason);
  return *row;
}

std::tuple<Tensor, Tensor> prefix_attn(Tensor q, Tensor k, Tensor v, OptionalTensor prefix_len,
                                       OptionalTensor key_range, OptionalTensor query_start,
                                       OptionalTensor key_flags, OptionalTensor segment_ids,
                                       OptionalTensor alibi_slopes,
                                       std::optional<double> softmax_scale, int64_t window) {
  Call call("prefix_attn: q", q);
  PrefixAttnTensors tensors{q,           k,         v,           prefix_len,  key_range,
                            query_start, key_flags, segment_ids, alibi_slopes};
  PrefixAttnParams params = check_prefix_attn(tensors, softmax_scale, window);
  const AttnKernels& kernels = kernels_for(params, call.device(), Pass::kForward);
  const auto outputs = new_prefix_attn_outputs(q, &params);
  if (std::get<1>(outputs).numel() == 0) return outputs;
  void* workspace = call.workspace(kernels.fwd_bytes(params, call.device()));
  raise(kernels.fwd(params, call.device(), workspace, call.stream()));
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_attn_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor prefix_len, OptionalTensor key_range, OptionalTensor query_start,
    OptionalTensor key_flags, OptionalTensor segment_ids, OptionalTensor alibi_slopes,
    std::optional<double> softmax_scale, int64_t window) {
  Call call("prefix_attn: q", q);
  PrefixAttnTensors tensors{q,           k,         v,           prefix_len,  key_range,
                            query_start, key_flags, segment_ids, alibi_slopes};
  PrefixAttnParams params = check_prefix_attn(tensors, softmax_scale, window);
  const AttnKernels& kernels = kernels_for(params, call.device(), Pass::kBackward);
  PrefixAttnBackwardCall backward(tensors, grad_out, grad_lse, out, lse, &params);
  void* workspace = call.workspace(kernels.bwd_bytes(params, backward.grads, call.device()));
  raise(kernels.bwd(params, backward.grads, call.device(), workspace, call.stream()));
  return backward.results();
}

}  // namespace
}  // namespace internvl::cuda

STABLE_TORCH_LIBRARY_IMPL(internvl, CUDA, m) {
  m.impl("prefix_attn", TORCH_BOX(&internvl::cuda::prefix_attn));
  m.impl("prefix_attn_backward", TORCH_BOX(&internvl::cuda::prefix_attn_backward));
}
