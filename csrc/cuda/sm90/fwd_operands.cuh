// Operands of a forward on their way into shared memory: K and V by tensor copies, through a ring
// of stages, and without what no query sees; Q by cp.async.
#pragma once

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tile/attn_fwd_schedule.cuh"
#include "cuda/tile/wgmma_layout.cuh"

namespace internvl::sm90 {

constexpr int kWarpgroup = 128;  // threads

template <int kCount>
INTERNVL_PTX_FN void fence_operands(float (&x)[kCount]) {
  INTERNVL_UNROLL
  for (int i = 0; i < kCount; ++i) ptx::fence_operand(x[i]);
}

// A tensor map and how it counts heads and batch rows: 0 where all share the same memory.
struct HeadMap {
  ptx::TensorMap map;
  int head_step, batch_step;
};

// A stage of a ring of kStages, and the parity of its barriers' phase.
template <int kStages>
struct Stage {
  uint32_t index = 0, parity = 0;

  INTERNVL_PTX_FN void advance() {
    if (++index < kStages) return;
    index = 0;
    parity ^= 1;
  }
};

// Starts the copy of the keys from j0 on of KV head `head` of batch row `b`; by one thread, which
// arrives at `full`.
template <class Tile>
INTERNVL_PTX_FN void load_keys(uint32_t to, const HeadMap& from, int j0, int head, int b,
                               uint32_t full) {
  ptx::mbarrier_arrive_expect_tx(full, Tile::kBytes);
  INTERNVL_UNROLL
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    ptx::tma_load_4d(to + panel * Tile::kPanelBytes, &from.map, panel * Tile::kPanel, j0,
                     head * from.head_step, b * from.batch_step, full);
}

// Zeros in place of the values of keys that no query sees: 0 * NaN would be NaN. By one warp, which
// has waited for the tile of keys from j0 on.
template <class Tile>
INTERNVL_PTX_FN void clear_unseen(const tile::KeyMask& mask, uint32_t values, int j0) {
  INTERNVL_NO_UNROLL
  for (int row = static_cast<int>(threadIdx.x) % 32; row < Tile::kRows; row += 32) {
    if (tile::needs_key(mask, j0 + row)) continue;
    INTERNVL_NO_UNROLL
    for (int column = 0; column < Tile::kColumns; column += 8)
      ptx::st_shared(values + Tile::offset(row, column), ptx::U32x4{0, 0, 0, 0});
  }
  ptx::fence_proxy_async_shared();
  ptx::sync_warp();
}

// Starts the copy of this thread's part of Q. (Rows of packed heads fit no tensor map.)
template <class Traits>
INTERNVL_PTX_FN void load_q_rows(uint32_t to, const View& q, const tile::FwdRows& rows,
                                 int head_dim) {
  using Team = typename Traits::Team;
  constexpr int kChunks = Traits::kHeadDim / 8;
  const char* base = static_cast<const char*>(q.data) + rows.offset(q);
  for (int i = Team::thread(); i < Traits::kBlockM * kChunks; i += Team::kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int rest = (head_dim - 8 * chunk) * 2;
    const bool reads = rows.exists(row) && rest > 0;
    ptx::cp_async_cg_16(to + Traits::q_offset(row, chunk),
                        reads ? base + rows.offset(q, row) + 16 * chunk : base,
                        !reads      ? 0
                        : rest < 16 ? rest
                                    : 16);
  }
  ptx::cp_async_commit_group();
}

// Q for the products of the whole team.
template <class Traits>
INTERNVL_PTX_FN void wait_for_q_rows() {
  ptx::cp_async_wait_group<0>();
  ptx::fence_proxy_async_shared();
  Traits::Team::sync();
}

}  // namespace internvl::sm90
