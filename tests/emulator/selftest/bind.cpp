#include <pybind11/stl.h>

#include "binding.h"
#include "selftest.h"

namespace py = pybind11;

namespace internvl::emulator {

void bind_selftest(pybind11::module_& m) {
  m.def("run_mma", &selftest::run_mma);
  m.def("run_ldmatrix", &selftest::run_ldmatrix);
  m.def("run_exchange", &selftest::run_exchange);
  m.def("run_math", &selftest::run_math);
  m.def("run_copy", &selftest::run_copy);
  m.def("run_named", &selftest::run_named);
  m.def(
      "run_wgmma",
      [](bool is_bf16, int n, bool a_mn, bool b_mn, bool accumulate, uint64_t a, uint64_t b,
         uint64_t image, int image_bytes, uint64_t a_registers, uint64_t d) {
        return selftest::run_wgmma({is_bf16, n, a_mn, b_mn, accumulate, a, b}, image, image_bytes,
                                   a_registers, d);
      },
      py::kw_only(), py::arg("is_bf16"), py::arg("n"), py::arg("a_mn"), py::arg("b_mn"),
      py::arg("accumulate"), py::arg("a"), py::arg("b"), py::arg("image"), py::arg("image_bytes"),
      py::arg("a_registers"), py::arg("d"));
  m.def(
      "run_copy_box",
      [](int type, std::vector<int64_t> sizes, std::vector<int64_t> byte_strides,
         std::vector<int> box, std::vector<int> at, int swizzle, int store, uint64_t base,
         uint64_t image, int image_bytes) {
        return selftest::run_copy_box({type, sizes, byte_strides, box, at, swizzle, store}, base,
                                      image, image_bytes);
      },
      py::kw_only(), py::arg("type"), py::arg("sizes"), py::arg("byte_strides"), py::arg("box"),
      py::arg("at"), py::arg("swizzle"), py::arg("store"), py::arg("base"), py::arg("image"),
      py::arg("image_bytes"));
  m.def("run_copy_row", &selftest::run_copy_row);
  m.def("panel_tile", [](int columns) {
    const selftest::PanelTileTable table = selftest::panel_tile(columns);
    return py::make_tuple(table.bytes, table.offsets, table.k_major, table.mn_major);
  });
  m.def("run_hopper", &selftest::run_hopper);
  m.def("hopper_names", &selftest::hopper_names);
}

}  // namespace internvl::emulator
