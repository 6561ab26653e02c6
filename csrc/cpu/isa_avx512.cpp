#define INTERNVL_ISA avx512
#define INTERNVL_LANES 16
#define INTERNVL_KERNELS kAvx512Kernels
#include "cpu/isa_kernels.h"
