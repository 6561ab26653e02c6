// Hopper backward of prefix_attn, dK and dV. Per visible (i, j) of every query head of the group:
//   P = exp(score - lse), dS = P * (dO V^T - delta), dV += P^T dO, dK += softmax_scale * dS^T Q.
// Meaning: semantics.py, reference.py.
//
// Grid: x = (tile of kBlockN keys, batch row, KV head); first key tiles first: causal ones are the
// longest. A block walks over (query head of the group, tile of kBlockM query rows) in a fixed
// order and adds everything up itself: no atomics, the same bits every time.
// Roles: warpgroups 0 and 1 compute, 64 keys each; the first warp of warpgroup 2 copies.
// Everything is held transposed: S^T = K Q^T and dP^T = V dO^T by wgmma from shared memory, P^T and
// dS^T are, in registers, the A operands of dV and dK.
// Pipeline: Q, dO, lse and delta of a tile come into one of kRowStages slots by bulk copies
// (`full`), whose consumers hand it back (`empty`). A warpgroup has P of this tile to compute while
// the tensor cores work on its dP, dS while they work on dV, and starts the next tile's S behind
// dK. Rows without gradient: the producer waits for such a tile itself and zeroes them, so that 0 *
// NaN does not arise. Shared memory: see BwdKvShared. Not here: dQ, slopes
// (prefix_attn_bwd_q_kernel.cuh).
#pragma once

#include "cuda/sm90/prefix_attn_bwd_kv_block.cuh"

namespace internvl::sm90 {

template <class Traits>
class BwdKv : public BwdKvBlock<Traits> {
 public:
  using Base = BwdKvBlock<Traits>;
  using T = typename Base::T;
  using Shared = typename Base::Shared;
  using KeyTile = typename Base::KeyTile;
  using RowTile = typename Base::RowTile;
  using Base::args_;
  using Base::kHeadDim;
  using Base::kScores;
  using Base::kSlices;
  using Base::kWords;
  using Base::shared_;

  using Base::Base;

  INTERNVL_PTX_FN void run() {
    this->init_barriers();
    if (this->produces()) return this->produce();
    ptx::set_max_registers_inc<kConsumerRegisters>();
    float s[kScores] = {}, dp[kScores] = {};
    uint32_t p[kSlices][4] = {}, ds[kSlices][4] = {};
    this->consume(
        [&](uint32_t now, int stage) {
          accumulate(s, dp, p, ds, now, stage);
          this->release(stage);
        },
        [] {});
    this->store(dk_, args_.params.softmax_scale, offsetof(Shared, k), args_.grads.dk,
                args_.aligned_dk);
    this->store(dv_, 1.0f, offsetof(Shared, v), args_.grads.dv, args_.aligned_dv);
  }

 private:
  INTERNVL_PTX_FN void accumulate(float (&s)[kScores], float (&dp)[kScores],
                                  uint32_t (&p)[kSlices][4], uint32_t (&ds)[kSlices][4],
                                  uint32_t now, int stage) {
    const uint32_t q = this->q(stage), grad = this->grad(stage);
    const bool partial = now % 2 != 0;
    uint32_t hidden[kWords] = {};
    if (partial) this->hidden_scores(hidden, this->row_tile(now / 2) * Traits::kBlockM);
    fence_registers(s);
    fence_registers(dp);
    ptx::wgmma_fence();
    multiply_rows<T, KeyTile, RowTile>(s, shared_ + offsetof(Shared, k), this->first_key(), q);
    ptx::wgmma_commit_group();
    multiply_rows<T, KeyTile, RowTile>(dp, shared_ + offsetof(Shared, v), this->first_key(), grad);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // S
    fence_registers(s);
    this->probabilities(s, now / 2, stage);
    if (partial) this->clear_hidden(s, hidden);
    to_operands<T>(p, s);
    fence_registers(p);
    fence_registers(dv_);
    ptx::wgmma_fence();
    multiply_columns<T, RowTile>(dv_, p, grad);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // dP
    fence_registers(dp);
    this->score_grads(dp, s, stage);
    if (partial) this->clear_hidden(dp, hidden);
    to_operands<T>(ds, dp);
    fence_registers(ds);
    fence_registers(dk_);
    ptx::wgmma_fence();
    multiply_columns<T, RowTile>(dk_, ds, q);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    fence_registers(dv_);
    fence_registers(dk_);
  }

  float dk_[kHeadDim / 2] = {};
  float dv_[kHeadDim / 2] = {};
};

// Wide heads: warpgroup 0 has S, P and dV of the block's keys, warpgroup 1 has dP, dS and dK. P
// goes over in fp32, thread by thread, through `exchange`.
template <class Traits>
class BwdKvWide : public BwdKvBlock<Traits> {
 public:
  using Base = BwdKvBlock<Traits>;
  using T = typename Base::T;
  using Shared = typename Base::Shared;
  using KeyTile = typename Base::KeyTile;
  using RowTile = typename Base::RowTile;
  using Base::args_;
  using Base::kHeadDim;
  using Base::kScores;
  using Base::kSlices;
  using Base::kWords;
  using Base::shared_;

  using Base::Base;

  INTERNVL_PTX_FN void run() {
    this->init_barriers();
    if (this->produces()) return this->produce();
    ptx::set_max_registers_inc<kConsumerRegisters>();
    float x[kScores] = {};              // S and P, or dP and dS
    uint32_t operand[kSlices][4] = {};  // P or dS
    int before = -1;  // the stage of the tile before, which dV or dK may still read
    uint32_t parity = 0;
    const bool first = this->warp_ < kConsumerWarps / 2;
    const auto release_before = [&] {
      if (before >= 0) this->release(before);
    };
    this->consume(
        [&](uint32_t now, int stage) {
          uint32_t hidden[kWords] = {};
          if (now % 2) this->hidden_scores(hidden, this->row_tile(now / 2) * Traits::kBlockM);
          start_scores(x, first ? this->q(stage) : this->grad(stage),
                       first ? offsetof(Shared, k) : offsetof(Shared, v));
          release_before();
          if (first)
            give_probabilities(x, now, stage, hidden, parity);
          else
            take_probabilities(x, now, stage, hidden, parity);
          add_products(operand, x, first ? this->grad(stage) : this->q(stage));
          before = stage;
          parity ^= 1;
        },
        [&] {
          ptx::wgmma_wait_group<0>();
          fence_registers(sum_);
          release_before();
          before = -1;
        });
    // Each through the memory that only its own products have read.
    if (first)
      this->store(sum_, 1.0f, offsetof(Shared, k), args_.grads.dv, args_.aligned_dv);
    else
      this->store(sum_, args_.params.softmax_scale, offsetof(Shared, v), args_.grads.dk,
                  args_.aligned_dk);
  }

 private:
  // x = keys of `member` times rows^T. The products of the tile before are done, too.
  INTERNVL_PTX_FN void start_scores(float (&x)[kScores], uint32_t rows, size_t member) {
    fence_registers(x);
    ptx::wgmma_fence();
    multiply_rows<T, KeyTile, RowTile>(x, shared_ + static_cast<uint32_t>(member), 0, rows);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    fence_registers(x);
    fence_registers(sum_);
  }

  INTERNVL_PTX_FN uint32_t exchange() const {
    return shared_ + offsetof(Shared, exchange) + threadIdx.x % kWarpgroupThreads * 16;
  }

  INTERNVL_PTX_FN void give_probabilities(float (&s)[kScores], uint32_t now, int stage,
                                          const uint32_t (&hidden)[kWords], uint32_t parity) {
    this->probabilities(s, now / 2, stage);
    if (now % 2) this->clear_hidden(s, hidden);
    ptx::mbarrier_wait_parity(shared_ + offsetof(Shared, p_empty), parity ^ 1);
    INTERNVL_UNROLL
    for (int n = 0; n < kScores / 4; ++n)
      ptx::st_shared(exchange() + n * kWarpgroupThreads * 16,
                     ptx::F32x4{s[4 * n], s[4 * n + 1], s[4 * n + 2], s[4 * n + 3]});
    ptx::sync_warp();
    if (this->lane_ == 0) ptx::mbarrier_arrive(shared_ + offsetof(Shared, p_full));
  }

  INTERNVL_PTX_FN void take_probabilities(float (&dp)[kScores], uint32_t now, int stage,
                                          const uint32_t (&hidden)[kWords], uint32_t parity) {
    ptx::mbarrier_wait_parity(shared_ + offsetof(Shared, p_full), parity);
    const uint32_t at = this->floats(offsetof(Shared, delta), stage) + this->lane_ % 4 * 8;
    INTERNVL_UNROLL
    for (int n = 0; n < kScores / 4; ++n) {
      const auto delta = ptx::ld_shared<ptx::F32x2>(at + n * 32);
      const auto p = ptx::ld_shared<ptx::F32x4>(exchange() + n * kWarpgroupThreads * 16);
      dp[4 * n] = p.x * (dp[4 * n] - delta.x);
      dp[4 * n + 1] = p.y * (dp[4 * n + 1] - delta.y);
      dp[4 * n + 2] = p.z * (dp[4 * n + 2] - delta.x);
      dp[4 * n + 3] = p.w * (dp[4 * n + 3] - delta.y);
    }
    if (now % 2) this->clear_hidden(dp, hidden);
    ptx::sync_warp();
    if (this->lane_ == 0) ptx::mbarrier_arrive(shared_ + offsetof(Shared, p_empty));
  }

  // dV += P^T dO, or dK += dS^T Q; under way until start_scores or the end of the list.
  INTERNVL_PTX_FN void add_products(uint32_t (&operand)[kSlices][4], const float (&x)[kScores],
                                    uint32_t rows) {
    to_operands<T>(operand, x);
    fence_registers(operand);
    fence_registers(sum_);
    ptx::wgmma_fence();
    multiply_columns<T, RowTile>(sum_, operand, rows);
    ptx::wgmma_commit_group();
  }

  float sum_[kHeadDim / 2] = {};  // dV or dK
};

template <class Traits>
__global__ void __launch_bounds__(kThreads, 1)
    prefix_attn_bwd_kv_kernel(const INTERNVL_GRID_CONSTANT BwdPlan plan) {
  if constexpr (Traits::kWide)
    BwdKvWide<Traits>(plan).run();
  else
    BwdKv<Traits>(plan).run();
}

}  // namespace internvl::sm90
