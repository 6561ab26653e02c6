#define INTERNVL_ISA avx2
#define INTERNVL_LANES 8
#define INTERNVL_KERNELS kAvx2Kernels
#include "cpu/isa_kernels.h"
