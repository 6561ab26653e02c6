#include "binding.h"
#include "selftest.h"

namespace internvl::emulator {

void bind_selftest(pybind11::module_& m) {
  m.def("run_mma", &selftest::run_mma);
  m.def("run_ldmatrix", &selftest::run_ldmatrix);
  m.def("run_exchange", &selftest::run_exchange);
  m.def("run_math", &selftest::run_math);
  m.def("run_copy", &selftest::run_copy);
  m.def("run_named", &selftest::run_named);
}

}  // namespace internvl::emulator
