// Python's way to the launches of prefix_attn, the one that csrc/cuda/prefix_attn.cpp takes.
#include <stdexcept>

#include "arguments.h"
#include "binding.h"
#include "cuda/kernel_table.h"

namespace internvl::emulator {
namespace {

const cuda::AttnKernels& kernels_of(const PrefixAttnParams& params, const DeviceInfo& device) {
  std::string reason;
  const cuda::AttnKernels* row =
      cuda::find_attn_kernels(params, device, cuda::Pass::kForward, &reason);
  if (!row) throw std::invalid_argument(reason);
  return *row;
}

}  // namespace

void bind_prefix_attn_fwd(py::module_& m) {
  m.def("prefix_attn_fwd_workspace_bytes", [](const py::dict& arguments, const py::dict& device) {
    const PrefixAttnParams params = attn_params_of({arguments});
    const DeviceInfo info = device_of({device});
    return kernels_of(params, info).fwd_bytes(params, info);
  });
  m.def("prefix_attn_fwd",
        [](const py::dict& arguments, const py::dict& device, uintptr_t workspace) {
          const PrefixAttnParams params = attn_params_of({arguments});
          const DeviceInfo info = device_of({device});
          void* memory = reinterpret_cast<void*>(workspace);
          return kernels_of(params, info).fwd(params, info, memory, nullptr).error;
        });
}

}  // namespace internvl::emulator
