// prefix_attn for few query rows, for compute capability 8.0 and newer: mma.sync, cp.async.
//
// One block per KV head (all query heads of its group share a tile of up to kBlockM rows, so K and
// V are read once) and split of the keys. Each warp holds 16 query rows; warps that would have none
// take a part of the keys of every tile instead: with up to 16 rows each of the four warps works on
// 16 of the 64 keys. Their sums meet in shared memory when the keys are through.
//
// The splits of a head write their sums (relative to the row's reference), then draw a ticket; the
// block with the last one adds all of them up, in the order of the splits whichever that block is,
// and writes out and lse. Nobody waits for another block.
//
// Key tiles come from a list in shared memory, as in the forward. Distance pruning needs a lower
// bound of every row's lse: each block finds one at the two nearest tiles, also when they are
// another split's.
//
// Shared memory: DecodeShared. Barriers in the loop: one before each product, see the forward.
//
// Meaning of mask, bias, lse and empty rows: python/internvl_kernels/semantics.py.
#pragma once

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm80/prefix_attn_decode_merge.cuh"
#include "cuda/tile/online_softmax.cuh"

namespace internvl::sm80 {

template <class Traits>
struct PrefixAttnDecode : DecodeMerge<Traits> {
  using Base = DecodeMerge<Traits>;
  using Element = typename Traits::Element;
  using Layout = typename Traits::Layout;
  using Shared = DecodeShared<Traits>;
  using Base::entry, Base::kv_addr, Base::lane, Base::listed, Base::mask, Base::plan, Base::q_addr,
      Base::thread, Base::warp_row;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kSlotBytes = Shared::kTile * 2;
  static constexpr int kRows = 2;  // of a lane: lane / 4 and lane / 4 + 8 of the warp's 16

  const typename Traits::KvCopy copy;
  const int slices;     // of 16 keys, that this warp has of a tile
  const int first_key;  // of them, in the tile
  const char *k, *v;    // key 0 of the head
  uint32_t slot;        // of the product that comes next
  bool q_taken = false;

  uint32_t q[Traits::kQInRegisters ? Traits::kHeadDim / 16 : 1][4];
  float s[Traits::kWarpSlices][2][4];
  uint32_t p[Traits::kWarpSlices][4];  // the weights as operands
  float o[Traits::kDimTiles][4];
  tile::OnlineSoftmax<kRows> softmax;

  INTERNVL_PTX_FN explicit PrefixAttnDecode(const DecodePlan& launch)
      : Base(launch),
        copy(this->thread),
        slices(launch.row_warps),
        first_key(this->thread / 32 / launch.row_warps * launch.row_warps * 16) {}

  // f(slice) for the slices of this warp.
  template <class F>
  INTERNVL_PTX_FN void each_slice(F f) const {
    INTERNVL_UNROLL
    for (int i = 0; i < Traits::kWarpSlices; ++i)
      if (i < slices) f(i);
  }

  // f(score, column after the lane's first in the slice) for the lane's scores of row r.
  template <class F>
  INTERNVL_PTX_FN void each_score(int i, int r, F f) {
    INTERNVL_UNROLL
    for (int c = 0; c < 4; ++c) f(s[i][c / 2][r * 2 + c % 2], c / 2 * 8 + c % 2);
  }

  // What row r of this lane brings to mask and bias.
  INTERNVL_PTX_FN tile::FwdRow own_row(int r) const {
    return this->row(warp_row + r * 8 + lane / 4);
  }

  // --- loads ---

  INTERNVL_PTX_FN void load_q(const tile::FwdRows& rows) const {
    const typename Traits::QCopy q_copy(thread);
    const View& view = plan.params.q;
    const char* base = static_cast<const char*>(view.data) + rows.offset(view);
    q_copy.load_rows(
        q_addr(), this->head_dim(),
        [&](int row) -> const char* {
          return rows.exists(row) ? base + rows.offset(view, row) : nullptr;
        },
        base);
    ptx::cp_async_commit_group();
  }

  // After a barrier behind the copy of Q.
  INTERNVL_PTX_FN void take_q() {
    if constexpr (Traits::kQInRegisters) {
      INTERNVL_UNROLL
      for (int d = 0; d < Traits::kHeadDim / 16; ++d) load_q_fragment(q[d], d);
    }
  }

  INTERNVL_PTX_FN void load_q_fragment(uint32_t (&a)[4], int d) const {
    const uint32_t q_lane = q_addr() + warp_row * Layout::kPitchBytes + Layout::a(lane);
    ptx::ldmatrix_x4(a, Layout::right(q_lane, 2 * d));
  }

  INTERNVL_PTX_FN void load(uint32_t to, const char* head, const View& view, int32_t entry) const {
    const int32_t j0 = tile::entry_tile(entry) * kBlockN;
    const tile::Rows src{head + j0 * (view.stride_s * 2), view.stride_s * 2};
    if (entry & tile::kNeedsMask) {
      const tile::KeyMask keys = mask();
      copy.load(to, src, this->head_dim(),
                [&](int row) { return tile::needs_key(keys, j0 + row); });
    } else {
      copy.load_all(to, src, this->head_dim());
    }
  }

  // Starts the copy of K or V of the list's entry `index`; behind the last one, an empty group.
  INTERNVL_PTX_FN void load_k(uint32_t to, int index) const {
    if (index < listed) load(to, k, plan.params.k, entry(index));
    ptx::cp_async_commit_group();
  }
  INTERNVL_PTX_FN void load_v(uint32_t to, int index) const {
    if (index < listed) load(to, v, plan.params.v, entry(index));
    ptx::cp_async_commit_group();
  }

  INTERNVL_PTX_FN uint32_t slot_after(uint32_t addr) const {
    addr += kSlotBytes;
    return addr == kv_addr() + Traits::kSlots * kSlotBytes ? kv_addr() : addr;
  }
  INTERNVL_PTX_FN uint32_t slot_before(uint32_t addr) const {
    return addr == kv_addr() ? addr + (Traits::kSlots - 1) * kSlotBytes : addr - kSlotBytes;
  }

  // Then the slot of the next product is full, and the one before is free, for all threads.
  INTERNVL_PTX_FN void wait_for_slot() const {
    ptx::cp_async_wait_group<Traits::kSlots - 2>();
    ptx::sync_threads();
  }

  // --- one key tile ---

  INTERNVL_PTX_FN void qk_gemm() {
    const uint32_t k_lane = slot + first_key * Layout::kPitchBytes + Layout::b(lane);
    each_slice([&](int i) {
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) each_score(i, r, [](float& x, int) { x = 0.0f; });
      INTERNVL_UNROLL
      for (int d = 0; d < Traits::kHeadDim / 16; ++d) {
        uint32_t a[4], b[4];
        if constexpr (!Traits::kQInRegisters) load_q_fragment(a, d);
        ptx::ldmatrix_x4(b, Layout::right(k_lane, 2 * d) + i * 16 * Layout::kPitchBytes);
        const uint32_t (&rows)[4] = Traits::kQInRegisters ? q[Traits::kQInRegisters ? d : 0] : a;
        ptx::mma_m16n8k16<Element>(s[i][0], rows, {b[0], b[1]}, s[i][0]);
        ptx::mma_m16n8k16<Element>(s[i][1], rows, {b[2], b[3]}, s[i][1]);
      }
    });
  }

  INTERNVL_PTX_FN int32_t lane_key(int32_t entry) const {
    return tile::entry_tile(entry) * kBlockN + first_key + 2 * (lane % 4);
  }

  // Bit 4 i + c of seen[r]: is score c of slice i visible to row r?
  INTERNVL_PTX_FN void see_keys(int32_t entry, uint32_t (&seen)[kRows]) const {
    seen[0] = seen[1] = ~0u;
    if (!(entry & tile::kNeedsMask)) return;
    const tile::KeyMask keys = mask();
    const int32_t j_lane = lane_key(entry);
    const tile::FwdRow own[kRows] = {own_row(0), own_row(1)};
    seen[0] = seen[1] = 0;
    INTERNVL_NO_UNROLL
    for (int i = 0; i < 4 * slices; ++i) {
      const int32_t j = j_lane + i / 4 * 16 + i % 4 / 2 * 8 + i % 2;
      const tile::Key key = tile::key_at(keys, j);
      const int32_t segment = keys.segments ? tile::key_segment(keys, j) : 0;
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const bool same = !keys.segments || (own[r].inside && own[r].segment == segment);
        seen[r] |= uint32_t{same && tile::sees(keys, own[r].p, key)} << i;
      }
    }
  }

  // Scores with bias and mask, in base 2, in place of the products.
  INTERNVL_PTX_FN void mask_and_bias(int32_t entry, const uint32_t (&seen)[kRows]) {
    const float distance = static_cast<float>(this->position0() - lane_key(entry));
    const float scale = plan.params.softmax_scale * tile::kLog2e;
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const tile::FwdRow own = own_row(r);
      const float away = distance + static_cast<float>(own.offset);
      each_slice([&](int i) {
        int bit = 4 * i;
        each_score(i, r, [&](float& x, int column) {
          const float bias = -own.slope_log2 * fabsf(away - static_cast<float>(i * 16 + column));
          x = seen[r] >> bit++ & 1 ? ptx::fma(x, scale, bias) : -INFINITY;
        });
      });
    }
  }

  // The largest score of the warp's keys for each row.
  INTERNVL_PTX_FN void find_max(float (&largest)[kRows]) {
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float x = -INFINITY;
      each_slice(
          [&](int i) { each_score(i, r, [&](float& score, int) { x = ptx::fmax(x, score); }); });
      largest[r] = tile::quad_max(x);
    }
  }

  INTERNVL_PTX_FN void softmax_step() {
    float tile_max[kRows];
    find_max(tile_max);
    softmax.update_max(tile_max, [&](const float (&factor)[kRows]) {
      INTERNVL_UNROLL
      for (int d = 0; d < Traits::kDimTiles; ++d) {
        INTERNVL_UNROLL
        for (int e = 0; e < 4; ++e) o[d][e] *= factor[e / 2];
      }
    });
    each_slice([&](int i) {
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float reference = softmax.reference(r);
        each_score(i, r, [&](float& x, int) {
          x = ptx::ex2(x - reference);
          softmax.row_sum[r] += x;
        });
      }
      tile::to_operand<Element>(p[i], s[i][0], s[i][1]);
    });
  }

  INTERNVL_PTX_FN void pv_gemm() {
    const uint32_t v_lane = slot + first_key * Layout::kPitchBytes + Layout::a(lane);
    each_slice([&](int i) {
      INTERNVL_UNROLL
      for (int d = 0; d < Traits::kDimTiles; d += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Layout::right(v_lane, d) + i * 16 * Layout::kPitchBytes);
        ptx::mma_m16n8k16<Element>(o[d], p[i], {b[0], b[1]}, o[d]);
        ptx::mma_m16n8k16<Element>(o[d + 1], p[i], {b[2], b[3]}, o[d + 1]);
      }
    });
  }

  // Entry `index` of the list, while the copies of later ones start.
  INTERNVL_PTX_FN void step(int index) {
    const int32_t now = entry(index);
    uint32_t seen[kRows];
    wait_for_slot();
    load_v(slot_before(slot), index + Traits::kSlots / 2 - 1);
    see_keys(now, seen);
    qk_gemm();
    slot = slot_after(slot);
    mask_and_bias(now, seen);
    softmax_step();
    wait_for_slot();
    load_k(slot_before(slot), index + Traits::kSlots / 2);
    pv_gemm();
    slot = slot_after(slot);
  }

  // --- which tiles ---

  // A lower bound of every row's lse in natural units, the same in every split: the best scores of
  // the two nearest key tiles. -inf where some row sees none of them, or nothing is to be pruned.
  INTERNVL_PTX_FN float lower_bound(const tile::FwdBlock& block) {
    const int tiles = this->bound_tiles(block);
    if (tiles == 0) return -INFINITY;
    for (int i = 0; i < tiles; ++i)
      load(kv_addr() + i * kSlotBytes, k, plan.params.k, this->bound_entry(block, i));
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::sync_threads();
    take_q();
    q_taken = true;
    float best[kRows] = {-INFINITY, -INFINITY};
    for (int i = 0; i < tiles; ++i) {
      uint32_t seen[kRows];
      float largest[kRows];
      slot = kv_addr() + i * kSlotBytes;
      see_keys(this->bound_entry(block, i), seen);
      qk_gemm();
      mask_and_bias(this->bound_entry(block, i), seen);
      find_max(largest);
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) best[r] = ptx::fmax(best[r], largest[r]);
    }
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) this->put_stats(r, {best[r], 0.0f});
    ptx::sync_threads();
    const float score = thread < block.rows.count ? this->warp_stats(thread).x : INFINITY;
    return this->team_min(score * tile::kLn2);
  }

  INTERNVL_PTX_FN void walk(float lower) {
    for (this->next_list(lower); listed > 0; this->next_list(lower)) {
      slot = kv_addr();
      INTERNVL_UNROLL
      for (int i = 0; i < Traits::kSlots / 2; ++i) {
        load_k(slot + 2 * i * kSlotBytes, i);
        if (i < Traits::kSlots / 2 - 1) load_v(slot + (2 * i + 1) * kSlotBytes, i);
      }
      ptx::cp_async_wait_group<Traits::kSlots - 1>();
      ptx::sync_threads();
      if (!q_taken) take_q();
      q_taken = true;
      for (int i = 0; i < listed; ++i) step(i);
    }
  }

  INTERNVL_PTX_FN void run() {
    const tile::FwdRows rows =
        this->describe_block([&](const tile::FwdRows& found) { load_q(found); });
    k = tile::rows_of(plan.params.k, rows.b, rows.head_kv).data;
    v = tile::rows_of(plan.params.v, rows.b, rows.head_kv).data;
    softmax.clear();
    INTERNVL_UNROLL
    for (int d = 0; d < Traits::kDimTiles; ++d) {
      INTERNVL_UNROLL
      for (int e = 0; e < 4; ++e) o[d][e] = 0.0f;
    }
    float lower;
    {
      const tile::FwdBlock block = this->block();
      this->take_share();
      lower = lower_bound(block);
    }
    walk(lower);
    this->merge(rows, softmax, o);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    prefix_attn_decode_kernel(const DecodePlan plan) {
  PrefixAttnDecode<Traits>(plan).run();
}

}  // namespace internvl::sm80
