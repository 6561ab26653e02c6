// Included once by each isa_*.cpp, which defines INTERNVL_ISA (namespace), INTERNVL_LANES and
// INTERNVL_KERNELS.
#include "cpu/clip_qk_layernorm_kernel.h"
#include "cpu/decode_kernel.h"
#include "cpu/kernels.h"
#include "cpu/prefix_attn_bwd_kernel.h"
#include "cpu/prefix_attn_fwd_kernel.h"

#define INTERNVL_BY_DTYPE(function) \
  {function<DType::kFloat32>, function<DType::kBFloat16>, function<DType::kFloat16>}

namespace internvl::cpu {

const Kernels INTERNVL_KERNELS = {
    INTERNVL_LANES,
    INTERNVL_ISA::kPanel,
    INTERNVL_BY_DTYPE(INTERNVL_ISA::pack_kv_tile),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::key_tile_norm),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::fwd_row_tile),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::merge_splits),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::decode_task),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::merge_decode),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::bwd_unit),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::reduce_dq),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::clip_qk_layernorm_rows),
    INTERNVL_BY_DTYPE(INTERNVL_ISA::clip_qk_layernorm_backward_rows),
};

}  // namespace internvl::cpu
