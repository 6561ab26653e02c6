// A consumer of the sm90 forward: a warpgroup with 64 query rows.
#pragma once

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/prefix_attn_fwd_producer.cuh"
#include "cuda/tile/online_softmax.cuh"

namespace internvl::sm90 {

template <class Traits>
struct FwdConsumer : tile::FwdSchedule<Traits, FwdShared<Traits>> {
  using Base = tile::FwdSchedule<Traits, FwdShared<Traits>>;
  using Element = typename Traits::Element;
  using Shared = FwdShared<Traits>;
  using Team = typename Traits::Team;
  using QTile = typename Traits::QTile;
  using KvTile = typename Traits::KvTile;
  using Base::lane, Base::listed, Base::mask, Base::next_entry, Base::next_listed, Base::q_addr,
      Base::shared, Base::thread;
  static constexpr int kRows = 2;  // per lane: see tile_row
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kChunks = Traits::kHeadDim / 8;

  const FwdPlan& plan;
  const int warpgroup;
  Stage<Traits::kStages> k_stage, v_stage;

  float s[kBlockN / 2] = {};    // scores, then weights
  uint32_t p[kBlockN / 16][4];  // the weights of the entry before, as operands
  float o[Traits::kHeadDim / 2] = {};
  tile::OnlineSoftmax<kRows> softmax;
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

  template <int kCount>
  INTERNVL_PTX_FN static void fence_operands(float (&x)[kCount]) {
    INTERNVL_UNROLL
    for (int i = 0; i < kCount; ++i) ptx::fence_operand(x[i]);
  }

  INTERNVL_PTX_FN float scale_log2() const { return plan.params.softmax_scale * tile::kLog2e; }

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

  // Starts the copy of this thread's part of Q. (Rows of packed heads fit no tensor map.)
  INTERNVL_PTX_FN void load_q(const tile::FwdRows& rows) const {
    const View& q = plan.params.q;
    const char* base = static_cast<const char*>(q.data) + rows.offset(q);
    for (int i = thread; i < Traits::kBlockM * kChunks; i += Team::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int rest = (this->head_dim() - 8 * chunk) * 2;
      const bool reads = rows.exists(row) && rest > 0;
      ptx::cp_async_cg_16(q_addr() + Traits::q_offset(row, chunk),
                          reads ? base + rows.offset(q, row) + 16 * chunk : base,
                          !reads      ? 0
                          : rest < 16 ? rest
                                      : 16);
    }
    ptx::cp_async_commit_group();
  }

  // Q for the products of every consumer.
  INTERNVL_PTX_FN void wait_for_q() const {
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async_shared();
    Team::sync();
  }

  // --- products ---

  INTERNVL_PTX_FN void start_qk() {
    const uint32_t k = k_tile();
    fence_operands(s);
    ptx::wgmma_fence();
    INTERNVL_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += 16)
      ptx::wgmma_ss<Element, kBlockN, ptx::Major::kK, ptx::Major::kK>(
          s, QTile::k_major(q_addr(), 64 * warpgroup, d), KvTile::k_major(k, 0, d), d > 0);
    ptx::wgmma_commit_group();
  }

  INTERNVL_PTX_FN void start_pv() {
    const uint32_t v = v_tile();
    fence_operands(o);
    INTERNVL_UNROLL
    for (int n = 0; n < kBlockN / 16; ++n)
      for (uint32_t& word : p[n]) ptx::fence_operand(word);
    ptx::wgmma_fence();
    INTERNVL_UNROLL
    for (int n = 0; n < kBlockN / 16; ++n)
      ptx::wgmma_rs<Element, Traits::kHeadDim, ptx::Major::kMN>(
          o, p[n], KvTile::mn_major(v, 16 * n, 0), true);
    ptx::wgmma_commit_group();
  }

  // --- softmax ---

  // Key j0 as seen from position0: how far it lies on the left.
  INTERNVL_PTX_FN float distance_to(int32_t j0) const {
    return static_cast<float>(this->position0() - j0);
  }

  // Bit i of seen[r]: is column i of the lane's visible to row r? Found before the scores
  // need the registers, in a loop that is not unrolled.
  INTERNVL_PTX_FN void see_keys(int32_t j_lane, uint32_t (&seen)[kRows]) const {
    const tile::KeyMask keys = mask();
    const tile::FwdRow rows[kRows] = {this->row(tile_row(0)), this->row(tile_row(1))};
    seen[0] = seen[1] = 0;
    INTERNVL_NO_UNROLL
    for (int i = 0; i < kBlockN / 4; ++i) {
      const int32_t j = j_lane + i / 2 * 8 + i % 2;
      const tile::Key key = tile::key_at(keys, j);
      const int32_t segment = keys.segments ? tile::key_segment(keys, j) : 0;
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const bool same = !keys.segments || (rows[r].inside && rows[r].segment == segment);
        seen[r] |= uint32_t{same && tile::sees(keys, rows[r].p, key)} << i;
      }
    }
  }

  // Scores with bias and mask, in base 2, in place of the products. No product is under way.
  INTERNVL_PTX_FN void mask_and_bias(int32_t j_lane, const uint32_t (&seen)[kRows]) {
    const float distance = distance_to(j_lane), scale = scale_log2();
    const tile::FwdRow rows[kRows] = {this->row(tile_row(0)), this->row(tile_row(1))};
    INTERNVL_UNROLL
    for (int i = 0; i < kBlockN / 2; ++i) {
      if (i % 8 == 0) ptx::wgmma_hold_order<0>();  // else all biases come first
      const int r = i / 2 % 2, column = i / 4 * 8 + i % 2;
      const float away = distance + static_cast<float>(rows[r].offset - column);
      const float bias = -rows[r].slope_log2 * fabsf(away);
      s[i] = seen[r] >> (i / 4 * 2 + i % 2) & 1 ? ptx::fma(s[i], scale, bias) : -INFINITY;
    }
  }

  // The bias of a tile on one side of its queries, one fma per score: the score becomes
  // scale_log2 * (s + side * slope / scale * column) + offset.
  INTERNVL_PTX_FN void linear_bias(int32_t entry, float (&offset)[kRows]) {
    const float distance = distance_to(tile::entry_tile(entry) * kBlockN + 2 * (lane % 4));
    const float inverse_scale = ptx::rcp(scale_log2());
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const tile::FwdRow row = this->row(tile_row(r));
      const float step = entry & tile::kRightOfQueries ? -row.slope_log2 : row.slope_log2;
      const float z_step = step * inverse_scale;
      offset[r] = -step * (distance + static_cast<float>(row.offset));
      each_score(
          r, [&](float& z, int column) { z = ptx::fma(z_step, static_cast<float>(column), z); });
    }
  }

  // Turns scores scale * z + offset into weights exp2(score - reference).
  INTERNVL_PTX_FN void find_weights(float scale, const float (&offset)[kRows]) {
    float tile_max[kRows];
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float largest = -INFINITY;
      each_score(r, [&](float& z, int) { largest = ptx::fmax(largest, z); });
      tile_max[r] = tile::quad_max(ptx::fma(largest, scale, offset[r]));
    }
    moved = false;
    softmax.update_max(tile_max, [&](const float (&by)[kRows]) {
      moved = true;
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) factor[r] = by[r];
    });
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float shift = offset[r] - softmax.reference(r);
      each_score(r, [&](float& x, int) {
        x = ptx::ex2(ptx::fma(x, scale, shift));
        softmax.row_sum[r] += x;
      });
    }
  }

  // After the product of the entry before: the output follows the reference, the weights become
  // operands.
  INTERNVL_PTX_FN void take_weights() {
    if (moved) {
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) each_output(r, [&](float& x) { x *= factor[r]; });
    }
    INTERNVL_UNROLL
    for (int n = 0; n < kBlockN / 16; ++n) {
      INTERNVL_UNROLL
      for (int i = 0; i < 4; ++i)
        p[n][i] = ptx::pack2<Element>(s[8 * n + 2 * i], s[8 * n + 2 * i + 1]);
    }
  }

  // --- the walk over the list ---

  INTERNVL_PTX_FN void end_pv() {
    fence_operands(o);
    release_v();
  }

  // The scores and weights of an entry; unless it is the first of its list, beside the product of
  // the entry before. (The bias of masked scores leaves no registers for that.)
  template <bool kFirst, bool kMasked>
  INTERNVL_PTX_FN void step(int32_t entry) {
    constexpr bool kBeside = !kFirst && !kMasked;
    const int32_t j_lane = tile::entry_tile(entry) * kBlockN + 2 * (lane % 4);
    uint32_t seen[kRows];
    if constexpr (kMasked) see_keys(j_lane, seen);
    wait_for_k();
    take_turn();
    start_qk();
    if constexpr (!kFirst) {
      wait_for_v();
      start_pv();
    }
    pass_turn();
    ptx::wgmma_wait_group<kBeside ? 1 : 0>();
    fence_operands(s);
    release_k();
    if constexpr (!kFirst && !kBeside) end_pv();
    float offset[kRows] = {};
    if constexpr (kMasked) {
      mask_and_bias(j_lane, seen);
      find_weights(1.0f, offset);
    } else {
      if (plan.params.alibi_slopes) linear_bias(entry, offset);
      find_weights(scale_log2(), offset);
    }
    if constexpr (kBeside) {
      ptx::wgmma_wait_group<0>();
      end_pv();
    }
    take_weights();
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

  // A lower bound of every row's lse, in natural units; -inf while some row has met no key.
  INTERNVL_PTX_FN float lower_bound(const tile::FwdRows& rows) const {
    float lower = INFINITY;
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float lse = softmax.lse_log2(r) * tile::kLn2;
      lower = rows.exists(tile_row(r)) ? ptx::fmin(lower, lse) : lower;
    }
    return this->team_min(lower);
  }

  // Makes the next list, and tells the producer.
  INTERNVL_PTX_FN void publish_list() {
    Base::refill([&](const tile::FwdRows& rows) { return lower_bound(rows); });
    if (thread != 0) return;
    ptx::st_shared(shared + offsetof(Shared, listed), listed);
    ptx::mbarrier_arrive(shared + offsetof(Shared, list_full));
  }

  // --- epilogue ---

  INTERNVL_PTX_FN void store_lse(const tile::FwdRows& rows, int r, float lse) const {
    const int row = tile_row(r);
    if (lane % 4 != 0 || !rows.exists(row)) return;
    const PrefixAttnParams& params = plan.params;
    const int64_t head = rows.b * params.heads_q + rows.head0 + rows.head(row);
    ptx::st_global(params.lse + head * params.seqlen_q + rows.query0 + rows.query(row), lse);
  }

  // Over the warpgroup's own rows of Q, whose last product is done.
  INTERNVL_PTX_FN void stage_out(const tile::FwdRows& rows) {
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float sum = tile::quad_sum(softmax.row_sum[r]);
      const bool empty = sum == 0.0f;
      const float inverse = empty ? 0.0f : 1.0f / sum;
      store_lse(rows, r, empty ? -INFINITY : (softmax.row_max[r] + ptx::lg2(sum)) * tile::kLn2);
      INTERNVL_UNROLL
      for (int d = 0; d < kChunks; ++d) {
        const float* pair = o + 4 * d + 2 * r;
        ptx::st_shared(q_addr() + Traits::q_offset(tile_row(r), d) + lane % 4 * 4,
                       ptx::pack2<Element>(pair[0] * inverse, pair[1] * inverse));
      }
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(Traits::kWarpgroupBarrier + warpgroup, kWarpgroup);
  }

  // By tensor copies where a map describes the output; else whole rows, 16 bytes at a time.
  INTERNVL_PTX_FN void store_out() {
    const tile::FwdRows rows = this->rows();
    stage_out(rows);
    const int first = 64 * warpgroup;
    if (plan.out_mapped) {
      if (thread % kWarpgroup != 0 || first >= rows.count) return;
      INTERNVL_UNROLL
      for (int panel = 0; panel < QTile::kPanels; ++panel)
        ptx::tma_store_4d(&plan.out, q_addr() + QTile::offset(first, panel * QTile::kPanel),
                          panel * QTile::kPanel, static_cast<int>(rows.query0) + first,
                          static_cast<int>(rows.head0), static_cast<int>(rows.b));
      ptx::bulk_commit_group();
      ptx::bulk_wait_group_read<0>();
      return;
    }
    const View& out = plan.params.out;
    char* base = static_cast<char*>(out.data) + rows.offset(out);
    for (int i = thread % kWarpgroup; i < 64 * kChunks; i += kWarpgroup) {
      const int row = first + i / kChunks;
      const int chunk = i % kChunks, elements = this->head_dim() - chunk * 8;
      if (!rows.exists(row) || elements <= 0) continue;
      tile::store_chunk(base + rows.offset(out, row) + chunk * 16,
                        ptx::ld_shared<ptx::U32x4>(q_addr() + Traits::q_offset(row, chunk)),
                        elements, plan.out_aligned);
    }
  }

  INTERNVL_PTX_FN void run() {
    this->describe_block([&](const tile::FwdRows& rows) { load_q(rows); });
    softmax.clear();
    if (warpgroup == Traits::kConsumers - 1) pass_turn();
    publish_list();
    wait_for_q();
    while (listed > 0) {
      walk_list();
      publish_list();
    }
    store_out();
    if (warpgroup == 0) take_turn();  // the last one that was passed on
  }
};

}  // namespace internvl::sm90
