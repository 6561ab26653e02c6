// A consumer of the sm90 forward: a warpgroup with 64 query rows.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/prefix_attn_fwd_producer.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/tile/attn_fwd_scores.cuh"

namespace internvl::sm90 {

template <class Traits>
struct FwdConsumer : tile::FwdScores<FwdConsumer<Traits>, Traits, FwdShared<Traits>> {
  using Base = tile::FwdScores<FwdConsumer, Traits, FwdShared<Traits>>;
  using Element = typename Traits::Element;
  using Shared = FwdShared<Traits>;
  using Team = typename Traits::Team;
  using QTile = typename Traits::QTile;
  using KvTile = typename Traits::KvTile;
  using Base::kBlockN, Base::kRows;
  using Base::lane, Base::listed, Base::next_entry, Base::q_addr, Base::shared, Base::softmax,
      Base::thread;
  static constexpr int kChunks = Traits::kHeadDim / 8;

  const FwdPlan& plan;
  const int warpgroup;
  Stage<Traits::kStages> k_stage, v_stage;

  float s[kBlockN / 2] = {};    // scores, then weights
  uint32_t p[kBlockN / 16][4];  // the weights of the entry before, as operands
  float o[Traits::kHeadDim / 2] = {};
  float factor[kRows];  // of the output, when its reference has moved
  bool moved = false;

  INTERNVL_PTX_FN explicit FwdConsumer(const FwdPlan& launch)
      : Base(launch), plan(launch), warpgroup(ptx::shfl_idx(this->thread / kWarpgroup, 0)) {}

  // Row of the tile that row r of this lane is.
  INTERNVL_PTX_FN int tile_row(int r) const { return thread / 32 * 16 + r * 8 + lane / 4; }

  // f(score, column after the lane's first) for the lane's scores of row r.
  template <class F>
  INTERNVL_PTX_FN void each_score(int r, F f) {
    INTERNVL_UNROLL
    for (int i = 0; i < kBlockN / 4; ++i) f(s[i / 2 * 4 + r * 2 + i % 2], i / 2 * 8 + i % 2);
  }

  // f(output) for the lane's outputs of row r.
  template <class F>
  INTERNVL_PTX_FN void each_output(int r, F f) {
    INTERNVL_UNROLL
    for (int i = 0; i < Traits::kHeadDim / 4; ++i) f(o[i / 2 * 4 + r * 2 + i % 2]);
  }

  // --- handing over ---

  INTERNVL_PTX_FN uint32_t k_tile() const {
    return shared + offsetof(Shared, k) + k_stage.index * KvTile::kBytes;
  }
  INTERNVL_PTX_FN uint32_t v_tile() const {
    return shared + offsetof(Shared, v) + v_stage.index * KvTile::kBytes;
  }
  INTERNVL_PTX_FN void wait_for_k() const {
    ptx::mbarrier_wait_parity(shared + offsetof(Shared, k_full) + 8 * k_stage.index,
                              k_stage.parity);
  }
  INTERNVL_PTX_FN void wait_for_v() const {
    ptx::mbarrier_wait_parity(shared + offsetof(Shared, v_full) + 8 * v_stage.index,
                              v_stage.parity);
  }
  INTERNVL_PTX_FN void release_k() {
    if (thread % kWarpgroup == 0)
      ptx::mbarrier_arrive(shared + offsetof(Shared, k_empty) + 8 * k_stage.index);
    k_stage.advance();
  }
  INTERNVL_PTX_FN void release_v() {
    if (thread % kWarpgroup == 0)
      ptx::mbarrier_arrive(shared + offsetof(Shared, v_empty) + 8 * v_stage.index);
    v_stage.advance();
  }

  // The turn to start products goes round.
  INTERNVL_PTX_FN void take_turn() const {
    if constexpr (Traits::kTakesTurns)
      ptx::bar_sync(Traits::kTurnBarrier + warpgroup, 2 * kWarpgroup);
  }
  INTERNVL_PTX_FN void pass_turn() const {
    const int next = warpgroup + 1 == Traits::kConsumers ? 0 : warpgroup + 1;
    if constexpr (Traits::kTakesTurns) ptx::bar_arrive(Traits::kTurnBarrier + next, 2 * kWarpgroup);
  }

  INTERNVL_PTX_FN uint32_t q_tile(int n) const {
    return shared + offsetof(Shared, q) + n * QTile::kBytes;
  }

  // --- products ---

  INTERNVL_PTX_FN void start_qk() {
    fence_registers(s);
    ptx::wgmma_fence();
    multiply_rows<Element, QTile, KvTile>(s, q_addr(), 64 * warpgroup, k_tile());
    ptx::wgmma_commit_group();
  }

  INTERNVL_PTX_FN void start_pv() {
    fence_registers(o);
    fence_registers(p);
    ptx::wgmma_fence();
    multiply_columns<Element, KvTile>(o, p, v_tile());
    ptx::wgmma_commit_group();
  }

  // --- softmax ---

  // Scores with bias and mask, in base 2, in place of the products. In the order of the registers,
  // each with a distance of its own: row by row it takes more of them than there are.
  INTERNVL_PTX_FN void mask_and_bias(int32_t entry, const uint32_t (&seen)[kRows]) {
    const float distance = this->distance_to(this->lane_key(entry)), scale = this->scale_log2();
    const tile::FwdRow rows[kRows] = {this->row(tile_row(0)), this->row(tile_row(1))};
    INTERNVL_UNROLL
    for (int i = 0; i < kBlockN / 2; ++i) {
      const int r = i / 2 % 2, column = i / 4 * 8 + i % 2;
      const float away = distance + static_cast<float>(rows[r].offset - column);
      const float bias = -rows[r].slope_log2 * fabsf(away);
      s[i] = seen[r] >> (i / 4 * 2 + i % 2) & 1 ? ptx::fma(s[i], scale, bias) : -INFINITY;
    }
  }

  INTERNVL_PTX_FN void find_weights(float scale, const float (&offset)[kRows]) {
    moved = false;
    Base::find_weights(scale, offset, [&](const float (&by)[kRows]) {
      moved = true;
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) factor[r] = by[r];
    });
  }

  // After the product of the entry before: the output follows the reference, the weights become
  // operands. The branch waits for itself, so that the wait for all stands behind it: the assembler
  // puts a wait before everything in its block that does not need what it waits for, here the
  // exponentials, which shall run meanwhile.
  INTERNVL_PTX_FN void take_weights() {
    if (moved) {
      ptx::wgmma_wait_group<0>();
      fence_registers(o);
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) each_output(r, [&](float& x) { x *= factor[r]; });
    }
    ptx::wgmma_wait_group<0>();
    fence_registers(o);
    to_operands<Element>(p, s);
  }

  // --- the walk over the list ---

  INTERNVL_PTX_FN void end_pv() {
    fence_registers(o);
    release_v();
  }

  // The scores and weights of an entry; unless it is the first of its list, beside the product of
  // the entry before, where the registers allow it.
  template <bool kFirst, bool kMasked>
  INTERNVL_PTX_FN void step(int32_t entry) {
    constexpr bool kBeside = !kFirst && (!kMasked || Traits::kMasksBeside);
    uint32_t seen[kRows];
    if constexpr (kMasked) this->see_keys(entry, seen);
    wait_for_k();
    take_turn();
    start_qk();
    if constexpr (!kFirst) {
      wait_for_v();
      start_pv();
    }
    pass_turn();
    ptx::wgmma_wait_group<kBeside ? 1 : 0>();
    fence_registers(s);
    release_k();
    if constexpr (!kFirst && !kBeside) end_pv();
    float offset[kRows] = {};
    if constexpr (kMasked) {
      mask_and_bias(entry, seen);
      find_weights(1.0f, offset);
    } else {
      if (plan.params.alibi_slopes) this->linear_bias(entry, offset);
      find_weights(this->scale_log2(), offset);
    }
    take_weights();
    if constexpr (kBeside) release_v();
  }

  // The product of the last entry of a list.
  INTERNVL_PTX_FN void finish_list() {
    wait_for_v();
    start_pv();
    ptx::wgmma_wait_group<0>();
    end_pv();
  }

  INTERNVL_PTX_FN void walk_list() {
    int32_t entry = next_entry();
    if (entry & tile::kNeedsMask)
      step<true, true>(entry);
    else
      step<true, false>(entry);
    entry = next_entry();
    while (entry >= 0) {
      if (entry & tile::kNeedsMask) {
        step<false, true>(entry);
        entry = next_entry();
      } else {
        do {
          step<false, false>(entry);
          entry = next_entry();
        } while (entry >= 0 && !(entry & tile::kNeedsMask));
      }
    }
    finish_list();
  }

  // Tells the producer of a list.
  INTERNVL_PTX_FN void publish(int32_t entries) const {
    if (thread != 0) return;
    ptx::st_shared(shared + offsetof(Shared, listed), entries);
    ptx::mbarrier_arrive(shared + offsetof(Shared, list_full));
  }

  // Makes the query tile's next list, if there is one.
  INTERNVL_PTX_FN void next_list() {
    this->refill();
    if (listed > 0) publish(listed);
  }

  // --- epilogue ---

  // Over the warpgroup's own rows of Q, whose last product is done.
  INTERNVL_PTX_FN void stage_out(const tile::FwdRows& rows, uint32_t staging) {
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float inverse = this->finish_row(rows, r);
      INTERNVL_UNROLL
      for (int d = 0; d < kChunks; ++d) {
        const float* pair = o + 4 * d + 2 * r;
        ptx::st_shared(staging + Traits::q_offset(tile_row(r), d) + lane % 4 * 4,
                       ptx::pack2<Element>(pair[0] * inverse, pair[1] * inverse));
      }
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(Traits::kWarpgroupBarrier + warpgroup, kWarpgroup);
  }

  // By tensor copies where a map describes the output; else whole rows, 16 bytes at a time.
  INTERNVL_PTX_FN void store_out(const tile::FwdRows& rows, uint32_t staging) {
    stage_out(rows, staging);
    const int first = 64 * warpgroup;
    if (plan.out_mapped) {
      if (thread % kWarpgroup != 0 || first >= rows.count) return;
      INTERNVL_UNROLL
      for (int panel = 0; panel < QTile::kPanels; ++panel)
        ptx::tma_store_4d(&plan.out, staging + QTile::offset(first, panel * QTile::kPanel),
                          panel * QTile::kPanel, static_cast<int>(rows.query0) + first,
                          static_cast<int>(rows.head0), static_cast<int>(rows.b));
      ptx::bulk_commit_group();
      return;
    }
    const View& out = plan.params.out;
    char* base = static_cast<char*>(out.data) + rows.offset(out);
    for (int i = thread % kWarpgroup; i < 64 * kChunks; i += kWarpgroup) {
      const int row = first + i / kChunks;
      const int chunk = i % kChunks, elements = this->head_dim() - chunk * 8;
      if (!rows.exists(row) || elements <= 0) continue;
      tile::store_chunk(base + rows.offset(out, row) + chunk * 16,
                        ptx::ld_shared<ptx::U32x4>(staging + Traits::q_offset(row, chunk)),
                        elements, plan.out_aligned);
    }
  }

  // The output has left shared memory.
  INTERNVL_PTX_FN void wait_for_store() const {
    if (thread % kWarpgroup == 0) ptx::bulk_wait_group_read<0>();
  }

  // --- one query tile after the other ---

  INTERNVL_PTX_FN void begin_tile() {
    this->describe_block([&](const tile::FwdRows& rows) {
      load_q_rows<Traits>(q_addr(), plan.params.q, rows, this->head_dim());
    });
    next_list();
  }

  INTERNVL_PTX_FN void attend() {
    softmax.clear();
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) each_output(r, [](float& x) { x = 0.0f; });
    wait_for_q_rows<Traits>();
    while (listed > 0) {
      walk_list();
      next_list();
    }
  }

  // The next tile is prepared, and its keys are on their way, before the output of this one leaves.
  INTERNVL_PTX_FN void attend_all() {
    const uint32_t tiles = static_cast<uint32_t>(plan.row_tiles) * plan.heads;
    uint32_t ahead = 2 * (gridDim.x - 1 - blockIdx.x) + 1;  // there and back again: see NOTES.md
    tile::FwdRows done = {};
    for (bool first = true;; first = false) {
      const uint32_t staging = this->q_at;
      if (!first) this->q_at = q_tile(staging == q_tile(0) ? 1 : 0);
      if (this->index < tiles)
        begin_tile();
      else
        publish(0);
      if (!first) store_out(done, staging);
      if (this->index >= tiles) return;
      attend();
      done = this->rows();
      this->index += ahead;
      ahead = 2 * gridDim.x - ahead;
      wait_for_store();
      Team::sync();  // nobody reads this tile's description any more
    }
  }

  INTERNVL_PTX_FN void run() {
    if (warpgroup == Traits::kConsumers - 1) pass_turn();
    if constexpr (Traits::kQTiles == 2) {
      attend_all();
    } else {
      begin_tile();
      attend();
      publish(0);
      store_out(this->rows(), q_addr());
    }
    wait_for_store();
    if (warpgroup == 0) take_turn();  // the last one that was passed on
  }
};

}  // namespace internvl::sm90
