// CUDA registration of clip_qk_layernorm: check, outputs, launch.
#include "cuda/sm80/clip_qk_layernorm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/torch_call.h"

namespace internvl::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm(
    Tensor qkv, int64_t q_width, int64_t k_width, std::optional<double> clip,
    OptionalTensor q_weight, OptionalTensor q_bias, OptionalTensor k_weight, OptionalTensor k_bias,
    double eps) {
  Call call("clip_qk_layernorm: qkv", qkv);
  ClipQkLayernormTensors tensors{qkv, q_weight, q_bias, k_weight, k_bias};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, eps);
  const auto outputs = new_clip_qk_layernorm_outputs(qkv, &params);
  raise(sm80::clip_qk_layernorm_fwd(params, call.device(), call.stream()));
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm_backward(
    OptionalTensor grad_q, OptionalTensor grad_k, OptionalTensor grad_v, Tensor qkv,
    int64_t q_width, int64_t k_width, std::optional<double> clip, OptionalTensor q_weight,
    OptionalTensor k_weight, Tensor statistics) {
  Call call("clip_qk_layernorm: qkv", qkv);
  ClipQkLayernormTensors tensors{qkv, q_weight, std::nullopt, k_weight, std::nullopt};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, 0.0);
  ClipQkLayernormBackwardCall backward(tensors, grad_q, grad_k, grad_v, statistics, &params);
  void* workspace = call.workspace(
      sm80::clip_qk_layernorm_bwd_workspace_bytes(params, backward.grads, call.device()));
  raise(
      sm80::clip_qk_layernorm_bwd(params, backward.grads, call.device(), workspace, call.stream()));
  return backward.results();
}

}  // namespace
}  // namespace internvl::cuda

STABLE_TORCH_LIBRARY_IMPL(internvl, CUDA, m) {
  m.impl("clip_qk_layernorm", TORCH_BOX(&internvl::cuda::clip_qk_layernorm));
  m.impl("clip_qk_layernorm_backward", TORCH_BOX(&internvl::cuda::clip_qk_layernorm_backward));
}
