// The choice of the instruction set: once, when the library is first asked.
#include "cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace internvl::cpu {

const IsaRow& isa_in_use() {
  static const IsaRow* row = choose_isa(std::getenv("INTERNVL_CPU_ISA"));
  if (!row) {
    std::string message = "INTERNVL_CPU_ISA is '" + std::string(std::getenv("INTERNVL_CPU_ISA")) +
                          "'; this processor "
                          "and build allow:";
    for (const IsaRow& other : kIsaTable)
      if (other.compiled && other.supported()) message += std::string(" ") + other.name;
    throw std::invalid_argument(message);
  }
  return *row;
}

const Kernels& kernels() {
  switch (isa_in_use().isa) {
#if defined(INTERNVL_ISA_AVX2)
    case Isa::kAvx2:
      return kAvx2Kernels;
#endif
#if defined(INTERNVL_ISA_AVX512)
    case Isa::kAvx512:
      return kAvx512Kernels;
#endif
#if defined(INTERNVL_ISA_AVX512_BF16)
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
#endif
    default:
      return kBaselineKernels;
  }
}

}  // namespace internvl::cpu
