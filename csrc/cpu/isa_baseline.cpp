#define INTERNVL_ISA baseline
#define INTERNVL_LANES 4
#define INTERNVL_KERNELS kBaselineKernels
#include "cpu/isa_kernels.h"
