// Python's way to the launches of the backward of prefix_attn.
#include "arguments.h"
#include "binding.h"
#include "cuda/kernel_table.h"

namespace internvl::emulator {
namespace {

PrefixAttnGrads grads_of(const Arguments& at) {
  PrefixAttnGrads grads;
  grads.grad_out = at.view("grad_out");
  grads.grad_lse = at.pointer<float>("grad_lse");
  grads.dq = at.view("dq");
  grads.dk = at.view("dk");
  grads.dv = at.view("dv");
  grads.dalibi_slopes = at.pointer<float>("dalibi_slopes");
  return grads;
}

const cuda::AttnKernels& kernels_of(const PrefixAttnParams& params, const DeviceInfo& device) {
  std::string reason;
  const cuda::AttnKernels* row =
      cuda::find_attn_kernels(params, device, cuda::Pass::kBackward, &reason);
  if (!row) throw py::value_error(reason);
  return *row;
}

}  // namespace

void bind_prefix_attn_bwd(py::module_& m) {
  m.def("prefix_attn_bwd_workspace_bytes", [](const py::dict& arguments, const py::dict& device) {
    const PrefixAttnParams params = attn_params_of({arguments});
    const DeviceInfo info = device_of({device});
    return kernels_of(params, info).bwd_bytes(params, grads_of({arguments}), info);
  });
  m.def("prefix_attn_bwd",
        [](const py::dict& arguments, const py::dict& device, uintptr_t workspace) {
          const PrefixAttnParams params = attn_params_of({arguments});
          const DeviceInfo info = device_of({device});
          return kernels_of(params, info)
              .bwd(params, grads_of({arguments}), info, reinterpret_cast<void*>(workspace), nullptr)
              .error;
        });
}

}  // namespace internvl::emulator
