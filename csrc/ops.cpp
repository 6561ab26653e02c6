// Schemas of torch.ops.internvl. Implementations: cpu/prefix_attn.cpp, cpu/clip_qk_layernorm.cpp;
// fake, autograd and autocast: python/internvl_kernels/registration.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(internvl, m) {
  m.def(
      "prefix_attn(Tensor q, Tensor k, Tensor v, *, Tensor? prefix_len=None, Tensor? "
      "key_range=None, "
      "Tensor? query_start=None, Tensor? key_flags=None, Tensor? segment_ids=None, Tensor? "
      "alibi_slopes=None, "
      "float? softmax_scale=None, int window=0) -> (Tensor out, Tensor lse)");
  m.def(
      "prefix_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, "
      "*, Tensor? prefix_len=None, Tensor? key_range=None, Tensor? query_start=None, Tensor? "
      "key_flags=None, "
      "Tensor? segment_ids=None, Tensor? alibi_slopes=None, float? softmax_scale=None, int "
      "window=0) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dalibi_slopes)");
  m.def(
      "clip_qk_layernorm(Tensor qkv, int q_width, int k_width, float? clip, Tensor? q_weight, "
      "Tensor? q_bias, "
      "Tensor? k_weight, Tensor? k_bias, float eps) -> (Tensor q, Tensor k, Tensor v, Tensor "
      "statistics)");
  m.def(
      "clip_qk_layernorm_backward(Tensor? grad_q, Tensor? grad_k, Tensor? grad_v, Tensor qkv, int "
      "q_width, "
      "int k_width, float? clip, Tensor? q_weight, Tensor? k_weight, Tensor statistics) "
      "-> (Tensor grad_qkv, Tensor dq_weight, Tensor dq_bias, Tensor dk_weight, Tensor dk_bias)");
  m.def("cpu_isa() -> int");
}
