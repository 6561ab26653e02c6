// Forward of prefix_attn for compute capability 8.0 and newer: mma.sync, cp.async, ldmatrix.
//
// One block per query tile of kBlockM rows of one head (or of the packed heads of one KV head);
// warp w owns rows [w * kBlockM / 4, ...) and keeps their scores and output in registers. Blocks
// are numbered longest first, so the block scheduler of the GPU is the work queue: a free slot
// takes the longest tile that is left (NOTES.md says why the grid is not persistent).
//
// Key tiles come from a list in shared memory, refilled by all threads together: nearest tile
// first, then outward on the left, then on the right; empty tiles and tiles that distance pruning
// (common/prune.h) can leave out never enter it. Full tiles run in a loop without mask code.
//
// Shared memory: FwdShared. Barriers: one before each product. It says that the slot's copies have
// landed for every thread, and that the slot of the product before may be overwritten.
//
// Meaning of mask, bias, lse and empty rows: python/internvl_kernels/semantics.py.
#pragma once

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm80/prefix_attn_fwd_traits.cuh"
#include "cuda/tile/attn_fwd_scores.cuh"

namespace internvl::sm80 {

using tile::FwdPlan, tile::FwdRow, tile::FwdRows, tile::kNeedsMask;

template <class Traits>
struct PrefixAttnFwd : tile::FwdScores<PrefixAttnFwd<Traits>, Traits, FwdShared<Traits>> {
  using Base = tile::FwdScores<PrefixAttnFwd, Traits, FwdShared<Traits>>;
  using Element = typename Traits::Element;
  using Layout = typename Traits::Layout;
  using Shared = FwdShared<Traits>;
  using Base::kBlockN, Base::kRows;
  using Base::lane, Base::listed, Base::mask, Base::next_entry, Base::next_listed, Base::plan,
      Base::q_addr, Base::softmax, Base::thread;
  static constexpr uint32_t kSlotBytes = sizeof(Shared::kv) / Traits::kStages;

  const typename Traits::KvCopy copy;
  const char *k, *v;  // key 0 of the head
  uint32_t slot;      // of the product that comes next

  float s[Traits::kRowTiles][Traits::kColTiles][4];
  uint32_t p[Traits::kRowTiles][Traits::kColTiles / 2][4];  // the weights as operands
  float o[Traits::kRowTiles][Traits::kDimTiles][4];

  INTERNVL_PTX_FN explicit PrefixAttnFwd(const FwdPlan& launch)
      : Base(launch), copy(this->thread) {}

  // Row of the tile that row r of this lane is.
  INTERNVL_PTX_FN int tile_row(int r) const {
    return thread / 32 * (Traits::kRowTiles * 16) + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }

  // f(score, column after the lane's first) for the lane's scores of row r.
  template <class F>
  INTERNVL_PTX_FN void each_score(int r, F f) {
    INTERNVL_UNROLL
    for (int i = 0; i < 2 * Traits::kColTiles; ++i)
      f(s[r / 2][i / 2][r % 2 * 2 + i % 2], i / 2 * 8 + i % 2);
  }

  // f(output) for the lane's outputs of row r.
  template <class F>
  INTERNVL_PTX_FN void each_output(int r, F f) {
    INTERNVL_UNROLL
    for (int i = 0; i < 2 * Traits::kDimTiles; ++i) f(o[r / 2][i / 2][r % 2 * 2 + i % 2]);
  }

  INTERNVL_PTX_FN uint32_t kv_addr() const { return this->shared + offsetof(Shared, kv); }

  // --- loads ---

  INTERNVL_PTX_FN void load_q(const FwdRows& rows) const {
    const typename Traits::QCopy q_copy(thread);
    const View& q = plan.params.q;
    const char* base = static_cast<const char*>(q.data) + rows.offset(q);
    q_copy.load_rows(
        q_addr(), this->head_dim(),
        [&](int row) -> const char* {
          return rows.exists(row) ? base + rows.offset(q, row) : nullptr;
        },
        base);
    ptx::cp_async_commit_group();
  }

  INTERNVL_PTX_FN uint32_t slot_after(uint32_t addr) const {
    addr += kSlotBytes;
    return addr == kv_addr() + Traits::kStages * kSlotBytes ? kv_addr() : addr;
  }
  INTERNVL_PTX_FN uint32_t slot_before(uint32_t addr) const {
    return addr == kv_addr() ? addr + (Traits::kStages - 1) * kSlotBytes : addr - kSlotBytes;
  }

  // Starts the copy of an entry's K or V. Every call makes one group.
  INTERNVL_PTX_FN void load(uint32_t to, const char* head, const View& view, int32_t entry) const {
    if (entry >= 0) {
      const int32_t j0 = tile::entry_tile(entry) * kBlockN;
      const tile::Rows src{head + j0 * (view.stride_s * 2), view.stride_s * 2};
      if (entry & kNeedsMask) {
        const tile::KeyMask keys = mask();
        copy.load(to, src, this->head_dim(),
                  [&](int row) { return tile::needs_key(keys, j0 + row); });
      } else {
        copy.load_all(to, src, this->head_dim());
      }
    }
    ptx::cp_async_commit_group();
  }
  INTERNVL_PTX_FN void load_k(uint32_t to, int32_t entry) const {
    load(to, k, plan.params.k, entry);
  }
  INTERNVL_PTX_FN void load_v(uint32_t to, int32_t entry) const {
    load(to, v, plan.params.v, entry);
  }

  INTERNVL_PTX_FN void wait_for_slot() const {
    ptx::cp_async_wait_group<Traits::kStages - 2>();
    ptx::sync_threads();
  }

  // --- one key tile ---

  INTERNVL_PTX_FN void qk_gemm() {
    const uint32_t q_lane =
        q_addr() + thread / 32 * (Traits::kRowTiles * 16) * Layout::kPitchBytes + Layout::a(lane);
    const uint32_t k_lane = slot + Layout::b(lane);
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) each_score(r, [](float& x, int) { x = 0.0f; });
    INTERNVL_UNROLL
    for (int d = 0; d < Traits::kHeadDim / 16; ++d) {
      uint32_t a[Traits::kRowTiles][4];
      INTERNVL_UNROLL
      for (int m = 0; m < Traits::kRowTiles; ++m)
        ptx::ldmatrix_x4(a[m], Layout::right(q_lane, 2 * d) + m * 16 * Layout::kPitchBytes);
      INTERNVL_UNROLL
      for (int n = 0; n < Traits::kColTiles; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, Layout::right(k_lane, 2 * d) + n * 8 * Layout::kPitchBytes);
        INTERNVL_UNROLL
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          ptx::mma_m16n8k16<Element>(s[m][n], a[m], {b[0], b[1]}, s[m][n]);
          ptx::mma_m16n8k16<Element>(s[m][n + 1], a[m], {b[2], b[3]}, s[m][n + 1]);
        }
      }
    }
  }

  // Scores with bias and mask, in base 2, in place of the products.
  INTERNVL_PTX_FN void mask_and_bias(int32_t entry, const uint32_t (&seen)[kRows]) {
    const float distance = this->distance_to(this->lane_key(entry)), scale = this->scale_log2();
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const FwdRow row = this->row(tile_row(r));
      const float away = distance + static_cast<float>(row.offset);
      int i = 0;
      each_score(r, [&](float& x, int column) {
        const float bias = -row.slope_log2 * fabsf(away - static_cast<float>(column));
        x = seen[r] >> i++ & 1 ? ptx::fma(x, scale, bias) : -INFINITY;
      });
    }
  }

  INTERNVL_PTX_FN void softmax_step(float scale, const float (&offset)[kRows]) {
    this->find_weights(scale, offset, [&](const float (&factor)[kRows]) {
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) each_output(r, [&](float& x) { x *= factor[r]; });
    });
    INTERNVL_UNROLL
    for (int i = 0; i < Traits::kRowTiles * Traits::kColTiles / 2; ++i) {
      const int m = i % Traits::kRowTiles, n = i / Traits::kRowTiles;
      tile::to_operand<Element>(p[m][n], s[m][2 * n], s[m][2 * n + 1]);
    }
  }

  INTERNVL_PTX_FN void pv_gemm() {
    const uint32_t v_lane = slot + Layout::a(lane);
    INTERNVL_UNROLL
    for (int n = 0; n < Traits::kColTiles; n += 2) {
      INTERNVL_UNROLL
      for (int d = 0; d < Traits::kDimTiles; d += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Layout::right(v_lane, d) + n * 8 * Layout::kPitchBytes);
        INTERNVL_UNROLL
        for (int m = 0; m < Traits::kRowTiles; ++m) {
          ptx::mma_m16n8k16<Element>(o[m][d], p[m][n / 2], {b[0], b[1]}, o[m][d]);
          ptx::mma_m16n8k16<Element>(o[m][d + 1], p[m][n / 2], {b[2], b[3]}, o[m][d + 1]);
        }
      }
    }
  }

  // Scores, weights, output of one entry, while the copies of `next` start.
  template <bool kMasked>
  INTERNVL_PTX_FN void step(int32_t entry, int32_t next) {
    constexpr bool kAhead = Traits::kStages == 3;  // a whole key tile ahead, else half of one
    wait_for_slot();
    if constexpr (kAhead)
      load_k(slot_before(slot), next);
    else
      load_v(slot_before(slot), entry);
    uint32_t seen[kRows];
    if constexpr (kMasked) this->see_keys(entry, seen);
    qk_gemm();
    slot = slot_after(slot);
    float offset[kRows] = {};
    if constexpr (kMasked) {
      mask_and_bias(entry, seen);
      softmax_step(1.0f, offset);
    } else {
      if (plan.params.alibi_slopes) this->linear_bias(entry, offset);
      softmax_step(this->scale_log2(), offset);
    }
    wait_for_slot();
    if constexpr (kAhead)
      load_v(slot_before(slot), next);
    else
      load_k(slot_before(slot), next);
    pv_gemm();
    slot = slot_after(slot);
  }

  // --- epilogue ---

  // Through the warp's own rows of Q, whose last product is done, to whole rows in global memory.
  INTERNVL_PTX_FN void store_out() {
    const FwdRows rows = this->rows();
    // A block without key tiles has not waited for Q yet.
    ptx::cp_async_wait_group<0>();
    ptx::sync_threads();
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float inverse = this->finish_row(rows, r);
      INTERNVL_UNROLL
      for (int d = 0; d < Traits::kDimTiles; ++d) {
        const float* pair = o[r / 2][d] + r % 2 * 2;
        ptx::st_shared(q_addr() + Layout::offset(tile_row(r), d) + lane % 4 * 4,
                       ptx::pack2<Element>(pair[0] * inverse, pair[1] * inverse));
      }
    }
    ptx::sync_warp();
    const View& out = plan.params.out;
    char* base = static_cast<char*>(out.data) + rows.offset(out);
    for (int i = lane; i < Traits::kRowTiles * 16 * Layout::kChunks; i += 32) {
      const int row = thread / 32 * (Traits::kRowTiles * 16) + i / Layout::kChunks;
      const int chunk = i % Layout::kChunks, elements = this->head_dim() - chunk * 8;
      if (!rows.exists(row) || elements <= 0) continue;
      tile::store_chunk(base + rows.offset(out, row) + chunk * 16,
                        ptx::ld_shared<ptx::U32x4>(q_addr() + Layout::offset(row, chunk)), elements,
                        plan.out_aligned);
    }
  }

  INTERNVL_PTX_FN void run() {
    const FwdRows rows = this->describe_block([&](const FwdRows& own) { load_q(own); });
    k = tile::rows_of(plan.params.k, rows.b, rows.head_kv).data;
    v = tile::rows_of(plan.params.v, rows.b, rows.head_kv).data;
    slot = kv_addr();
    softmax.clear();
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) each_output(r, [](float& x) { x = 0.0f; });
    this->refill();
    int32_t entry = next_entry();
    load_k(slot, entry);
    if constexpr (Traits::kStages == 3) load_v(slot_after(slot), entry);
    while (entry >= 0) {
      if (next_listed == listed) this->refill();
      if (entry & kNeedsMask) {
        const int32_t next = next_entry();
        step<true>(entry, next);
        entry = next;
      } else {
        do {
          const int32_t next = next_entry();
          step<false>(entry, next);
          entry = next;
        } while (entry >= 0 && !(entry & kNeedsMask) && next_listed < listed);
      }
    }
    store_out();
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    prefix_attn_fwd_kernel(const FwdPlan plan) {
  PrefixAttnFwd<Traits>(plan).run();
}

}  // namespace internvl::sm80
