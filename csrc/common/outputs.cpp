#include "common/outputs.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace internvl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;

float* floats_of(const Tensor& tensor) {
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

Tensor like(const Tensor& t) { return new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)}); }

// As many rows as qkv, of another width.
Tensor rows_like(const Tensor& qkv, int64_t width, std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < qkv.dim(); ++d) shape.push_back(qkv.size(d));
  shape.push_back(width);
  return new_empty(qkv, {shape.data(), shape.size()}, dtype);
}

// The gradient of a parameter; empty without that parameter.
Tensor parameter_gradient(const Tensor& qkv, bool present, int64_t width, float** data) {
  Tensor gradient = new_empty(qkv, {present ? width : 0}, ScalarType::Float);
  if (present) *data = floats_of(gradient);
  return gradient;
}

}  // namespace

std::tuple<Tensor, Tensor> new_prefix_attn_outputs(const Tensor& q, PrefixAttnParams* params) {
  Tensor out = like(q);
  Tensor lse = new_empty(q, {params->batch, params->heads_q, params->seqlen_q}, ScalarType::Float);
  params->out = view_of(out);
  params->lse = floats_of(lse);
  return {out, lse};
}

PrefixAttnBackwardCall::PrefixAttnBackwardCall(const PrefixAttnTensors& tensors,
                                               const Tensor& grad_out,
                                               const OptionalTensor& grad_lse_in, const Tensor& out,
                                               const Tensor& lse_in, PrefixAttnParams* params)
    : lse(check_lse("prefix_attn_backward", "lse", lse_in, tensors.q)),
      dq(like(tensors.q)),
      dk(like(tensors.k)),
      dv(like(tensors.v)),
      dslopes(
          new_empty(tensors.q, {tensors.alibi_slopes ? params->heads_q : 0}, ScalarType::Float)) {
  constexpr const char* kOp = "prefix_attn_backward";
  grads.grad_out = check_like(kOp, "grad_out", grad_out, tensors.q);
  params->out = check_like(kOp, "out", out, tensors.q);
  params->lse = floats_of(lse);
  if (grad_lse_in) {
    grad_lse = check_lse(kOp, "grad_lse", *grad_lse_in, tensors.q);
    grads.grad_lse = floats_of(*grad_lse);
  }
  grads.dq = view_of(dq);
  grads.dk = view_of(dk);
  grads.dv = view_of(dv);
  grads.dalibi_slopes = tensors.alibi_slopes ? floats_of(dslopes) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> new_clip_qk_layernorm_outputs(
    const Tensor& qkv, ClipQkLayernormParams* params) {
  Tensor q = rows_like(qkv, params->q_width), k = rows_like(qkv, params->k_width);
  Tensor v = rows_like(qkv, params->k_width), statistics = rows_like(qkv, 4, ScalarType::Float);
  params->q = q.mutable_data_ptr();
  params->k = k.mutable_data_ptr();
  params->v = v.mutable_data_ptr();
  params->statistics = floats_of(statistics);
  return {q, k, v, statistics};
}

ClipQkLayernormBackwardCall::ClipQkLayernormBackwardCall(
    const ClipQkLayernormTensors& tensors, OptionalTensor grad_q_in, OptionalTensor grad_k_in,
    OptionalTensor grad_v_in, const Tensor& statistics_in, ClipQkLayernormParams* params)
    : grad_q(std::move(grad_q_in)),
      grad_k(std::move(grad_k_in)),
      grad_v(std::move(grad_v_in)),
      statistics(check_statistics(statistics_in, tensors.qkv, params->rows)) {
  const Tensor& qkv = tensors.qkv;
  const int64_t q_width = params->q_width, k_width = params->k_width;
  params->statistics = floats_of(statistics);
  grads.grad_q = check_gradient_rows("grad_q", grad_q, qkv, q_width, &grads.grad_q_stride);
  grads.grad_k = check_gradient_rows("grad_k", grad_k, qkv, k_width, &grads.grad_k_stride);
  grads.grad_v = check_gradient_rows("grad_v", grad_v, qkv, k_width, &grads.grad_v_stride);
  grad_qkv = rows_like(qkv, params->width());
  grads.grad_qkv = grad_qkv.mutable_data_ptr();
  dq_weight = parameter_gradient(qkv, tensors.q_weight.has_value(), q_width, &grads.dq_weight);
  dq_bias = parameter_gradient(qkv, tensors.q_weight.has_value(), q_width, &grads.dq_bias);
  dk_weight = parameter_gradient(qkv, tensors.k_weight.has_value(), k_width, &grads.dk_weight);
  dk_bias = parameter_gradient(qkv, tensors.k_weight.has_value(), k_width, &grads.dk_bias);
}

}  // namespace internvl
