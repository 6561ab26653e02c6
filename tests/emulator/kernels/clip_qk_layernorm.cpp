// Python's way to the launches of clip_qk_layernorm.
#include "arguments.h"
#include "binding.h"
#include "cuda/sm80/clip_qk_layernorm_launch.cuh"

namespace internvl::emulator {
namespace {

ClipQkLayernormParams params_of(const Arguments& at) {
  ClipQkLayernormParams params;
  params.dtype = at.dtype("dtype");
  params.parameter_dtype = at.dtype("parameter_dtype");
  params.rows = at.integer("rows");
  params.q_width = at.integer("q_width");
  params.k_width = at.integer("k_width");
  params.qkv_stride = at.integer("qkv_stride");
  params.has_clip = at.has("clip");
  if (params.has_clip) params.clip = at.number("clip");
  params.eps = at.number("eps");
  params.qkv = at.pointer<void>("qkv");
  params.q_weight = at.pointer<void>("q_weight");
  params.q_bias = at.pointer<void>("q_bias");
  params.k_weight = at.pointer<void>("k_weight");
  params.k_bias = at.pointer<void>("k_bias");
  params.q = at.pointer<void>("q");
  params.k = at.pointer<void>("k");
  params.v = at.pointer<void>("v");
  params.statistics = at.pointer<float>("statistics");
  return params;
}

ClipQkLayernormGrads grads_of(const Arguments& at) {
  ClipQkLayernormGrads grads;
  grads.grad_q = at.pointer<void>("grad_q");
  grads.grad_k = at.pointer<void>("grad_k");
  grads.grad_v = at.pointer<void>("grad_v");
  grads.grad_q_stride = at.integer("grad_q_stride");
  grads.grad_k_stride = at.integer("grad_k_stride");
  grads.grad_v_stride = at.integer("grad_v_stride");
  grads.grad_qkv = at.pointer<void>("grad_qkv");
  grads.dq_weight = at.pointer<float>("dq_weight");
  grads.dq_bias = at.pointer<float>("dq_bias");
  grads.dk_weight = at.pointer<float>("dk_weight");
  grads.dk_bias = at.pointer<float>("dk_bias");
  return grads;
}

}  // namespace

void bind_clip_qk_layernorm(py::module_& m) {
  m.def("clip_qk_layernorm_fwd", [](const py::dict& arguments, const py::dict& device) {
    return sm80::clip_qk_layernorm_fwd(params_of({arguments}), device_of({device}), nullptr).error;
  });
  m.def("clip_qk_layernorm_bwd_workspace_bytes",
        [](const py::dict& arguments, const py::dict& device) {
          const Arguments at{arguments};
          return sm80::clip_qk_layernorm_bwd_workspace_bytes(params_of(at), grads_of(at),
                                                             device_of({device}));
        });
  m.def("clip_qk_layernorm_bwd",
        [](const py::dict& arguments, const py::dict& device, uintptr_t workspace) {
          const Arguments at{arguments};
          return sm80::clip_qk_layernorm_bwd(params_of(at), grads_of(at), device_of({device}),
                                             reinterpret_cast<void*>(workspace), nullptr)
              .error;
        });
}

}  // namespace internvl::emulator
