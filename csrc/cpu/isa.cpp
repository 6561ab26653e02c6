#include "cpu/isa.h"

#include <cstring>

namespace internvl::cpu {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
// Every processor with AVX2 has F16C; older compilers cannot ask for it.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
#if defined(INTERNVL_AVX512_ON_AVX2)
  return has_avx2();
#endif
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
#if defined(INTERNVL_AVX512_ON_AVX2)
  return has_avx2();
#elif defined(INTERNVL_ISA_AVX512_BF16)  // only compilers that know the feature can ask for it
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
#endif

#if defined(INTERNVL_ISA_AVX2)
constexpr bool kAvx2Compiled = true;
#else
constexpr bool kAvx2Compiled = false;
#endif

#if defined(INTERNVL_ISA_AVX512)
constexpr bool kAvx512Compiled = true;
#else
constexpr bool kAvx512Compiled = false;
#endif

#if defined(INTERNVL_ISA_AVX512_BF16)
constexpr bool kAvx512Bf16Compiled = true;
#else
constexpr bool kAvx512Bf16Compiled = false;
#endif

bool runs(const IsaRow& row) { return row.compiled && row.supported(); }

}  // namespace

const IsaRow kIsaTable[kIsaRows] = {
    {Isa::kBaseline, "baseline", "any processor", 4, true, always},
    {Isa::kAvx2, "avx2", "AVX2, FMA, F16C", 8, kAvx2Compiled, has_avx2},
    {Isa::kAvx512, "avx512", "AVX-512 F, BW, VL, DQ", 16, kAvx512Compiled, has_avx512},
    {Isa::kAvx512Bf16, "avx512_bf16", "AVX-512 F, BW, VL, DQ, BF16", 16, kAvx512Bf16Compiled,
     has_avx512_bf16},
};

const IsaRow* choose_isa(const char* wanted) {
  const IsaRow* best = nullptr;
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const IsaRow& row : kIsaTable)
    if (runs(row) && (any || std::strcmp(wanted, row.name) == 0)) best = &row;
  return best;
}

}  // namespace internvl::cpu
