// CUDA registration of clip_qk_layernorm: check, outputs, launch.
#include "cuda/sm80/clip_qk_layernorm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "cuda/torch_call.h"

namespace internvl::cuda {
namespace {

using torch::headeronly::ScalarType;

Tensor rows_like(const Tensor& qkv, int64_t width, std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < qkv.dim(); ++d) shape.push_back(qkv.size(d));
  shape.push_back(width);
  return torch::stable::new_empty(qkv, {shape.data(), shape.size()}, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm(
    Tensor qkv, int64_t q_width, int64_t k_width, std::optional<double> clip,
    OptionalTensor q_weight, OptionalTensor q_bias, OptionalTensor k_weight, OptionalTensor k_bias,
    double eps) {
  Call call(qkv);
  ClipQkLayernormTensors tensors{qkv, q_weight, q_bias, k_weight, k_bias};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, eps);
  Tensor q = rows_like(qkv, q_width), k = rows_like(qkv, k_width), v = rows_like(qkv, k_width);
  Tensor statistics = rows_like(qkv, 4, ScalarType::Float);
  params.q = q.mutable_data_ptr();
  params.k = k.mutable_data_ptr();
  params.v = v.mutable_data_ptr();
  params.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  raise(sm80::clip_qk_layernorm_fwd(params, call.device(), call.stream()));
  return {q, k, v, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm_backward(
    OptionalTensor grad_q, OptionalTensor grad_k, OptionalTensor grad_v, Tensor qkv,
    int64_t q_width, int64_t k_width, std::optional<double> clip, OptionalTensor q_weight,
    OptionalTensor k_weight, Tensor statistics) {
  Call call(qkv);
  ClipQkLayernormTensors tensors{qkv, q_weight, std::nullopt, k_weight, std::nullopt};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, 0.0);
  statistics = check_statistics(statistics, qkv, params.rows);
  params.statistics = static_cast<float*>(const_cast<void*>(statistics.const_data_ptr()));
  ClipQkLayernormGrads grads;
  grads.grad_q = check_gradient_rows("grad_q", grad_q, qkv, q_width, &grads.grad_q_stride);
  grads.grad_k = check_gradient_rows("grad_k", grad_k, qkv, k_width, &grads.grad_k_stride);
  grads.grad_v = check_gradient_rows("grad_v", grad_v, qkv, k_width, &grads.grad_v_stride);
  Tensor grad_qkv = rows_like(qkv, params.width());
  grads.grad_qkv = grad_qkv.mutable_data_ptr();
  const auto parameter = [&](const OptionalTensor& weight, int64_t width, float** data) {
    Tensor grad = torch::stable::new_empty(qkv, {weight ? width : 0}, ScalarType::Float);
    if (weight) *data = static_cast<float*>(grad.mutable_data_ptr());
    return grad;
  };
  Tensor dq_weight = parameter(q_weight, q_width, &grads.dq_weight);
  Tensor dq_bias = parameter(q_weight, q_width, &grads.dq_bias);
  Tensor dk_weight = parameter(k_weight, k_width, &grads.dk_weight);
  Tensor dk_bias = parameter(k_weight, k_width, &grads.dk_bias);
  void* workspace =
      call.workspace(sm80::clip_qk_layernorm_bwd_workspace_bytes(params, grads, call.device()));
  raise(sm80::clip_qk_layernorm_bwd(params, grads, call.device(), workspace, call.stream()));
  return {grad_qkv, dq_weight, dq_bias, dk_weight, dk_bias};
}

}  // namespace
}  // namespace internvl::cuda

STABLE_TORCH_LIBRARY_IMPL(internvl, CUDA, m) {
  m.impl("clip_qk_layernorm", TORCH_BOX(&internvl::cuda::clip_qk_layernorm));
  m.impl("clip_qk_layernorm_backward", TORCH_BOX(&internvl::cuda::clip_qk_layernorm_backward));
}
