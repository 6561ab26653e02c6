#define INTERNVL_ISA avx512_bf16
#define INTERNVL_LANES 16
#define INTERNVL_BF16_PAIRS 1
#define INTERNVL_KERNELS kAvx512Bf16Kernels
#include "cpu/isa_kernels.h"
