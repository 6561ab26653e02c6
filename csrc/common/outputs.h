// What the operators return: fresh tensors, their memory written into the kernel parameters. One
// place for all compiled backends, as check.h is for what comes in.
#pragma once

#include <tuple>

#include "common/check.h"

namespace internvl {

// out and lse, whose memory `params` then names.
std::tuple<Tensor, Tensor> new_prefix_attn_outputs(const Tensor& q, PrefixAttnParams* params);

// A checked call of prefix_attn_backward: the gradients that come in and the memory of those that
// go out, which live as long as this does.
struct PrefixAttnBackwardCall {
  // The gradients of `tensors`, whose checked `params` get out and lse.
  PrefixAttnBackwardCall(const PrefixAttnTensors& tensors, const Tensor& grad_out,
                         const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse,
                         PrefixAttnParams* params);

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {dq, dk, dv, dslopes}; }

  PrefixAttnGrads grads;
  Tensor lse, dq, dk, dv, dslopes;
  OptionalTensor grad_lse;
};

// q, k, v and the statistics, whose memory `params` then names.
std::tuple<Tensor, Tensor, Tensor, Tensor> new_clip_qk_layernorm_outputs(
    const Tensor& qkv, ClipQkLayernormParams* params);

// The same for clip_qk_layernorm_backward.
struct ClipQkLayernormBackwardCall {
  ClipQkLayernormBackwardCall(const ClipQkLayernormTensors& tensors, OptionalTensor grad_q,
                              OptionalTensor grad_k, OptionalTensor grad_v,
                              const Tensor& statistics, ClipQkLayernormParams* params);

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {grad_qkv, dq_weight, dq_bias, dk_weight, dk_bias};
  }

  ClipQkLayernormGrads grads;
  OptionalTensor grad_q, grad_k, grad_v;
  Tensor statistics, grad_qkv, dq_weight, dq_bias, dk_weight, dk_bias;
};

}  // namespace internvl
