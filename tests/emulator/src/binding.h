#pragma once

#include <pybind11/pybind11.h>

namespace internvl::emulator {

// Small kernels that use the machine in known ways, good and bad.
void bind_selftest(pybind11::module_& m);

// Launches of the package's kernels (kernels/).
void bind_clip_qk_layernorm(pybind11::module_& m);
void bind_prefix_attn_fwd(pybind11::module_& m);
void bind_prefix_attn_bwd(pybind11::module_& m);

}  // namespace internvl::emulator
