// The functions every instruction set provides, and the table of those compiled into this library.
#pragma once

#include "cpu/isa.h"
#include "cpu/plan.h"

namespace internvl::cpu {

constexpr int kDTypes = 3;  // indexed by DType

struct Kernels {
  int lanes;  // floats per vector
  int panel;  // columns per packed panel: block sizes are multiples of it

  void (*pack_kv_tile[kDTypes])(const FwdPlan&, int64_t b, int64_t head_kv, int64_t tile, float* k,
                                float* v);
  float (*key_tile_norm[kDTypes])(const PrefixAttnParams&, const uint8_t* used, int64_t b,
                                  int64_t head_kv, int64_t j_lo, int64_t block_n);
  void (*fwd_row_tile[kDTypes])(const FwdPlan&, const RowTask&, float* scratch);
  void (*merge_splits[kDTypes])(const FwdPlan&, const RowTask&, float* scratch);
  void (*decode_task[kDTypes])(const DecodePlan&, const DecodeTask&, float* scratch);
  void (*merge_decode[kDTypes])(const DecodePlan&, const DecodeTask&, float* scratch);
  void (*bwd_unit[kDTypes])(const BwdPlan&, const BwdUnit&, float* scratch);
  void (*reduce_dq[kDTypes])(const BwdPlan&, int64_t b, int64_t head, int64_t row0, int64_t rows);
  void (*clip_qk_layernorm[kDTypes])(const ClipQkLayernormParams&, int64_t begin, int64_t end,
                                     float* scratch);
  void (*clip_qk_layernorm_backward[kDTypes])(const ClipQkLayernormParams&,
                                              const ClipQkLayernormGrads&, int64_t begin,
                                              int64_t end, float* sums, float* scratch);
};

// Defined by isa_<name>.cpp.
extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

// The kernels in use: INTERNVL_CPU_ISA, else the best row the processor runs. Chosen once, when the
// library loads.
const Kernels& kernels();
const IsaRow& isa_in_use();  // throws when INTERNVL_CPU_ISA names one that does not run here

}  // namespace internvl::cpu
