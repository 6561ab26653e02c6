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
// the tensor cores work on its dP, dS while they work on dV; dK hides behind the other warpgroup.
// Rows without gradient: the producer waits for such a tile itself and zeroes them, so that 0 * NaN
// does not arise. Shared memory: see BwdKvShared. Not here: dQ, slopes
// (prefix_attn_bwd_q_kernel.cuh).
#pragma once

#include "cuda/sm90/prefix_attn_bwd_kv_block.cuh"

namespace internvl::sm90 {

template <class Traits>
class BwdKv {
 public:
  using Block = BwdKvBlock<Traits>;
  using T = typename Traits::Element;

  INTERNVL_PTX_FN explicit BwdKv(const Block& block) : block_(block) {}

  INTERNVL_PTX_FN void run() {
    block_.consume(
        [&](uint32_t now, int stage) {
          accumulate(now, stage);
          block_.release(stage);
        },
        [] {});
    block_.store_dk(dk_, offsetof(BwdKvShared<Traits>, k));
    block_.store_dv(dv_, offsetof(BwdKvShared<Traits>, v));
  }

 private:
  INTERNVL_PTX_FN void accumulate(uint32_t now, int stage) {
    const uint32_t q = block_.q(stage), grad = block_.grad(stage);
    const bool partial = now % 2 != 0;
    KvBits<Traits> hidden = {};
    if (partial) block_.hidden_scores(hidden, now / 2);
    fence_registers(s_);
    fence_registers(dp_);
    ptx::wgmma_fence();
    block_.multiply_keys(s_, offsetof(BwdKvShared<Traits>, k), q);
    ptx::wgmma_commit_group();
    block_.multiply_keys(dp_, offsetof(BwdKvShared<Traits>, v), grad);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // S
    fence_registers(s_);
    block_.probabilities(s_, now / 2, stage);
    if (partial) clear_hidden(s_, hidden);
    to_operands<T>(p_, s_);
    fence_registers(p_);
    fence_registers(dv_);
    ptx::wgmma_fence();
    multiply_columns<T, typename Block::RowTile>(dv_, p_, grad);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // dP
    fence_registers(dp_);
    block_.score_grads(dp_, s_, stage);
    if (partial) clear_hidden(dp_, hidden);
    to_operands<T>(ds_, dp_);
    fence_registers(ds_);
    fence_registers(dk_);
    ptx::wgmma_fence();
    multiply_columns<T, typename Block::RowTile>(dk_, ds_, q);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    fence_registers(dv_);
    fence_registers(dk_);
  }

  const Block& block_;
  KvScores<Traits> s_ = {}, dp_ = {};  // then P, dS
  KvOperand<Traits> p_ = {}, ds_ = {};
  KvSums<Traits> dk_ = {}, dv_ = {};
};

// Wide heads: warpgroup 0 has S, P and dV of the block's keys, warpgroup 1 has dP, dS and dK. P
// goes over in fp32, thread by thread, through `exchange`.
template <class Traits>
class BwdKvWide {
 public:
  using Block = BwdKvBlock<Traits>;
  using Shared = BwdKvShared<Traits>;
  using T = typename Traits::Element;

  INTERNVL_PTX_FN explicit BwdKvWide(const Block& block)
      : block_(block), first_(block.warp() < kConsumerWarps / 2) {}

  INTERNVL_PTX_FN void run() {
    block_.consume([&](uint32_t now, int stage) { accumulate(now, stage); },
                   [&] {
                     ptx::wgmma_wait_group<0>();
                     fence_registers(sum_);
                     release_before();
                     before_ = -1;
                   });
    // Each through the memory that only its own products have read.
    if (first_)
      block_.store_dv(sum_, offsetof(Shared, k));
    else
      block_.store_dk(sum_, offsetof(Shared, v));
  }

 private:
  INTERNVL_PTX_FN void accumulate(uint32_t now, int stage) {
    KvBits<Traits> hidden = {};
    if (now % 2) block_.hidden_scores(hidden, now / 2);
    start_scores(stage);
    release_before();
    if (first_)
      give_probabilities(now, stage, hidden);
    else
      take_probabilities(now, stage, hidden);
    add_products(first_ ? block_.grad(stage) : block_.q(stage));
    before_ = stage;
    parity_ ^= 1;
  }

  INTERNVL_PTX_FN void release_before() const {
    if (before_ >= 0) block_.release(before_);
  }

  // S = K Q^T, or dP = V dO^T. The products of the tile before are done, too.
  INTERNVL_PTX_FN void start_scores(int stage) {
    fence_registers(x_);
    ptx::wgmma_fence();
    block_.multiply_keys(x_, first_ ? offsetof(Shared, k) : offsetof(Shared, v),
                         first_ ? block_.q(stage) : block_.grad(stage));
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    fence_registers(x_);
    fence_registers(sum_);
  }

  INTERNVL_PTX_FN uint32_t exchange() const {
    return block_.at(offsetof(Shared, exchange)) + threadIdx.x % kWarpgroupThreads * 16;
  }

  INTERNVL_PTX_FN void give_probabilities(uint32_t now, int stage, const KvBits<Traits>& hidden) {
    block_.probabilities(x_, now / 2, stage);
    if (now % 2) clear_hidden(x_, hidden);
    ptx::mbarrier_wait_parity(block_.at(offsetof(Shared, p_empty)), parity_ ^ 1);
    INTERNVL_UNROLL
    for (int n = 0; n < Traits::kBlockM / 8; ++n)
      ptx::st_shared(exchange() + n * kWarpgroupThreads * 16,
                     ptx::F32x4{x_[4 * n], x_[4 * n + 1], x_[4 * n + 2], x_[4 * n + 3]});
    ptx::sync_warp();
    if (block_.lane() == 0) ptx::mbarrier_arrive(block_.at(offsetof(Shared, p_full)));
  }

  INTERNVL_PTX_FN void take_probabilities(uint32_t now, int stage, const KvBits<Traits>& hidden) {
    ptx::mbarrier_wait_parity(block_.at(offsetof(Shared, p_full)), parity_);
    const uint32_t at = block_.lane_delta(stage);
    INTERNVL_UNROLL
    for (int n = 0; n < Traits::kBlockM / 8; ++n) {
      const auto delta = ptx::ld_shared<ptx::F32x2>(at + n * 32);
      const auto p = ptx::ld_shared<ptx::F32x4>(exchange() + n * kWarpgroupThreads * 16);
      x_[4 * n] = p.x * (x_[4 * n] - delta.x);
      x_[4 * n + 1] = p.y * (x_[4 * n + 1] - delta.y);
      x_[4 * n + 2] = p.z * (x_[4 * n + 2] - delta.x);
      x_[4 * n + 3] = p.w * (x_[4 * n + 3] - delta.y);
    }
    if (now % 2) clear_hidden(x_, hidden);
    ptx::sync_warp();
    if (block_.lane() == 0) ptx::mbarrier_arrive(block_.at(offsetof(Shared, p_empty)));
  }

  // dV += P^T dO, or dK += dS^T Q; under way until start_scores or the end of the list.
  INTERNVL_PTX_FN void add_products(uint32_t rows) {
    to_operands<T>(operand_, x_);
    fence_registers(operand_);
    fence_registers(sum_);
    ptx::wgmma_fence();
    multiply_columns<T, typename Block::RowTile>(sum_, operand_, rows);
    ptx::wgmma_commit_group();
  }

  const Block& block_;
  const bool first_;                // of the warpgroups
  int before_ = -1;                 // the stage of the tile before, which dV or dK may still read
  uint32_t parity_ = 0;             // of the barriers of `exchange`
  KvScores<Traits> x_ = {};         // S and P, or dP and dS
  KvOperand<Traits> operand_ = {};  // P or dS
  KvSums<Traits> sum_ = {};         // dV or dK
};

template <class Traits>
__global__ void __launch_bounds__(kThreads, 1)
    prefix_attn_bwd_kv_kernel(const INTERNVL_GRID_CONSTANT BwdPlan plan) {
  const BwdKvBlock<Traits> block(plan);
  block.init_barriers();
  if (block.produces()) return block.produce();
  ptx::set_max_registers_inc<kConsumerRegisters>();
  if constexpr (Traits::kWide)
    BwdKvWide<Traits>(block).run();
  else
    BwdKv<Traits>(block).run();
}

}  // namespace internvl::sm90
