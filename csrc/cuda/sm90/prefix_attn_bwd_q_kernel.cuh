// Hopper backward of prefix_attn, dQ and the gradient of the slopes. Per visible (i, j):
//   P = exp(score - lse), dS = P * (dO V^T - delta), dQ += softmax_scale * dS K,
//   dalibi_slopes[h] -= dS * |p - j|.
// Meaning: semantics.py, reference.py.
//
// Grid: x = (tile of kBlockRows query rows, batch row, query head); last rows first: causal ones
// are the longest. A block keeps its Q and dO in shared memory and walks over tiles of kBlockKeys
// keys.
// Roles: warpgroups 0 and 1 compute, 64 rows each; the first warp of warpgroup 2 copies.
// S = Q K^T and dP = dO V^T by wgmma from shared memory; dS is, in registers, the A operand of dQ.
// Pipeline: K and V of a tile come into slots of their own by bulk copies; V's slot is free again
// when dP is there, K's after dQ. A warpgroup has P to compute while the tensor cores work on dP,
// and, where its registers allow (kAhead), starts the next tile's S behind dQ. Keys that no query
// sees: the producer waits for such a tile itself and zeroes their rows of K, so that 0 * NaN does
// not arise. The slopes' sum of a block is added up in a fixed order and goes to args.slope_sums.
// Shared memory: see BwdQShared.
#pragma once

#include "cuda/ptx/registers.cuh"
#include "cuda/sm90/prefix_attn_bwd_steps.cuh"

namespace internvl::sm90 {

template <class Traits>
struct BwdQShared {
  using RowTile = tile::PanelTile<Traits::kBlockRows, Traits::kHeadDim>;
  using KeyTile = tile::PanelTile<Traits::kBlockKeys, Traits::kHeadDim>;
  alignas(1024) uint8_t q[RowTile::kBytes];  // later dQ
  alignas(1024) uint8_t grad[RowTile::kBytes];
  alignas(1024) uint8_t k[Traits::kKStages][KeyTile::kBytes];
  alignas(1024) uint8_t v[Traits::kVStages][KeyTile::kBytes];
  alignas(16) float lse_log2[Traits::kBlockRows];
  float delta[Traits::kBlockRows];
  uint64_t full_k[Traits::kKStages], empty_k[Traits::kKStages];
  uint64_t full_v[Traits::kVStages], empty_v[Traits::kVStages];
  uint64_t rows_full, landed;
  uint32_t tile[Traits::kKStages];  // twice the key tile, plus 1 if it needs the mask; kNoMoreTiles
  float slope_sums[kConsumerWarps];
  TileList list;
};

template <class Traits>
class BwdQ {
 public:
  using T = typename Traits::Element;
  using Shared = BwdQShared<Traits>;
  using KeyTile = typename Shared::KeyTile;
  using RowTile = typename Shared::RowTile;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kRows = Traits::kBlockRows, kKeys = Traits::kBlockKeys;
  static constexpr int kKStages = Traits::kKStages, kVStages = Traits::kVStages;
  static constexpr bool kAhead = kHeadDim < 128;  // there are registers to start S behind dQ
  static constexpr int kScores = kKeys / 2;       // of a thread
  static constexpr int kSlices = kKeys / 16;      // of the product over keys
  static constexpr int kWords = kScores / 32;     // a bit per score

  INTERNVL_PTX_FN BwdQ(const BwdPlan& plan)
      : plan_(plan),
        args_(plan.args),
        shared_(ptx::dynamic_shared()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32) {
    const int64_t tiles = (args_.params.seqlen_q + kRows - 1) / kRows;
    place_ = tile::place_of_block(tiles, args_.params.batch, args_.params.heads_q, args_.section_q);
    place_.tile = static_cast<int32_t>(tiles) - 1 - place_.tile;
    items_ = static_cast<int32_t>(args_.key_tiles);
  }

  INTERNVL_PTX_FN void run() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kKStages; ++stage) {
        ptx::mbarrier_init(barrier(offsetof(Shared, full_k), stage), 1);
        ptx::mbarrier_init(barrier(offsetof(Shared, empty_k), stage), kConsumerWarps);
      }
      for (int stage = 0; stage < kVStages; ++stage) {
        ptx::mbarrier_init(barrier(offsetof(Shared, full_v), stage), 1);
        ptx::mbarrier_init(barrier(offsetof(Shared, empty_v), stage), kConsumerWarps);
      }
      ptx::mbarrier_init(barrier(offsetof(Shared, rows_full), 0), 1);
      ptx::mbarrier_init(barrier(offsetof(Shared, landed), 0), 1);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
    if (warp_ >= kConsumerWarps) {
      ptx::set_max_registers_dec<kProducerRegisters>();
      if (warp_ == kConsumerWarps) produce();
    } else {
      ptx::set_max_registers_inc<kConsumerRegisters>();
      consume();
      store();
      if (args_.slope_sums) store_slope_sum();
    }
  }

 private:
  INTERNVL_PTX_FN uint32_t barrier(size_t member, int stage) const {
    return shared_ + static_cast<uint32_t>(member) + stage * 8;
  }
  INTERNVL_PTX_FN uint32_t tile_word(int stage) const {
    return shared_ + offsetof(Shared, tile) + stage * 4;
  }
  INTERNVL_PTX_FN uint32_t keys(size_t member, int stage) const {
    return shared_ + static_cast<uint32_t>(member) + stage * KeyTile::kBytes;
  }
  INTERNVL_PTX_FN int head_kv() const { return static_cast<int>(place_.h / args_.group); }
  INTERNVL_PTX_FN int first_row() const { return place_.tile * kRows; }

  INTERNVL_PTX_FN tile::KeyMask mask() const {
    return tile::key_mask(args_.params, args_.keys, args_.key_tiles, place_.b);
  }

  // ---- the producing warp ----

  INTERNVL_PTX_FN void produce() {
    if (items_ == 0) return;
    if (lane_ == 0) {
      const uint32_t rows_full = barrier(offsetof(Shared, rows_full), 0);
      const int64_t place =
          (int64_t{place_.b} * args_.params.heads_q + place_.h) * args_.padded_rows + first_row();
      ptx::mbarrier_arrive_expect_tx(rows_full, 2 * RowTile::kBytes + 2 * kRows * 4);
      ptx::bulk_load(shared_ + offsetof(Shared, lse_log2), args_.lse_log2 + place, kRows * 4,
                     rows_full);
      ptx::bulk_load(shared_ + offsetof(Shared, delta), args_.delta + place, kRows * 4, rows_full);
      load_tile<RowTile>(shared_ + offsetof(Shared, q), &plan_.q, first_row(), place_.h, place_.b,
                         rows_full);
      load_tile<RowTile>(shared_ + offsetof(Shared, grad), &plan_.grad_out, first_row(), place_.h,
                         place_.b, rows_full);
    }
    Slot<kKStages> k;
    Slot<kVStages> v;
    uint32_t landed_parity = 0;
    for (int32_t first = 0;; first += TileList::kItems) {
      walk_list(shared_ + offsetof(Shared, list), first, [&](int32_t item, bool partial) {
        ptx::mbarrier_wait_parity(barrier(offsetof(Shared, empty_k), k.stage), k.parity ^ 1);
        send_k(item, partial, k.stage, landed_parity);
        k.next();
        ptx::mbarrier_wait_parity(barrier(offsetof(Shared, empty_v), v.stage), v.parity ^ 1);
        if (lane_ == 0) {
          const uint32_t full = barrier(offsetof(Shared, full_v), v.stage);
          ptx::mbarrier_arrive_expect_tx(full, KeyTile::kBytes);
          load_tile<KeyTile>(keys(offsetof(Shared, v), v.stage), &plan_.v, item * kKeys, head_kv(),
                             place_.b, full);
        }
        v.next();
      });
      ptx::mbarrier_wait_parity(barrier(offsetof(Shared, empty_k), k.stage), k.parity ^ 1);
      ptx::sync_warp();  // the list has been read
      if (lane_ == 0) {
        ptx::st_shared(tile_word(k.stage), uint32_t{kNoMoreTiles});
        ptx::mbarrier_arrive(barrier(offsetof(Shared, full_k), k.stage));
      }
      k.next();
      if (first >= items_ - TileList::kItems) return;  // no sum beyond 31 bits
    }
  }

  INTERNVL_PTX_FN void send_k(int32_t item, bool partial, int stage, uint32_t& landed_parity) {
    const bool clear = partial && any_key_unseen(item);
    const uint32_t full = barrier(offsetof(Shared, full_k), stage);
    const uint32_t arrived = clear ? barrier(offsetof(Shared, landed), 0) : full;
    const uint32_t k = keys(offsetof(Shared, k), stage);
    if (lane_ == 0) {
      ptx::st_shared(tile_word(stage), static_cast<uint32_t>(item) * 2 + (partial ? 1u : 0u));
      ptx::mbarrier_arrive_expect_tx(arrived, KeyTile::kBytes);
      load_tile<KeyTile>(k, &plan_.k, item * kKeys, head_kv(), place_.b, arrived);
    }
    if (!clear) return;
    ptx::mbarrier_wait_parity(arrived, landed_parity);
    landed_parity ^= 1;
    const tile::KeyMask own = mask();
    clear_rows<KeyTile>(k, [&](int row) { return !tile::needs_key(own, item * kKeys + row); });
    ptx::fence_proxy_async_shared();
    ptx::sync_warp();
    if (lane_ == 0) ptx::mbarrier_arrive(full);
  }

  // Of the keys that exist: those beyond the last are zeros already.
  INTERNVL_PTX_FN bool any_key_unseen(int32_t item) const {
    const tile::KeyMask own = mask();
    bool any = false;
    INTERNVL_NO_UNROLL
    for (int row = lane_; row < kKeys; row += 32) {
      const int32_t j = item * kKeys + row;
      any |= j < own.seqlen_k && !tile::needs_key(own, j);
    }
    return ptx::vote_any(any);
  }

  // ---- the computing warpgroups ----

  INTERNVL_PTX_FN int lane_row() const { return first_row() + warp_ * 16 + lane_ / 4; }

  // lse or delta of the lane's first row, or of one that many after. Loaded again for each tile:
  // the registers are worth more.
  INTERNVL_PTX_FN float of_row(size_t member, int after) const {
    return ptx::ld_shared<float>(shared_ + static_cast<uint32_t>(member) +
                                 (warp_ * 16 + lane_ / 4 + after) * 4);
  }

  INTERNVL_PTX_FN void consume() {
    if (items_ == 0) return;
    float s[kScores] = {}, dp[kScores] = {};
    uint32_t ds[kSlices][4] = {};
    Slot<kKStages> k;
    Slot<kVStages> v;
    for (int32_t first = 0;; first += TileList::kItems) {
      fill_list(shared_ + offsetof(Shared, list), first, items_,
                [&](int64_t item) { return classify(item); });
      if (first == 0) ptx::mbarrier_wait_parity(barrier(offsetof(Shared, rows_full), 0), 0);
      int before = -1;  // K's stage of the tile before, whose dQ may be under way
      for (;; k.next(), v.next()) {
        ptx::mbarrier_wait_parity(barrier(offsetof(Shared, full_k), k.stage), k.parity);
        const auto now = ptx::ld_shared<uint32_t>(tile_word(k.stage));
        if (now == kNoMoreTiles) break;
        accumulate(s, dp, ds, now, k.stage, v, before);
        before = kAhead ? k.stage : -1;
      }
      ptx::wgmma_wait_group<0>();
      if (before >= 0) release(offsetof(Shared, empty_k), before);
      release(offsetof(Shared, empty_k), k.stage);
      k.next();
      if (first >= items_ - TileList::kItems) break;
    }
    fence_registers(dq_);
  }

  // The warp no longer reads the stage.
  INTERNVL_PTX_FN void release(size_t member, int stage) const {
    ptx::sync_warp();
    if (lane_ == 0) ptx::mbarrier_arrive(barrier(member, stage));
  }

  INTERNVL_PTX_FN void accumulate(float (&s)[kScores], float (&dp)[kScores],
                                  uint32_t (&ds)[kSlices][4], uint32_t now, int k_stage,
                                  const Slot<kVStages>& v, int before) {
    const uint32_t k = keys(offsetof(Shared, k), k_stage);
    const bool partial = now % 2 != 0;
    const int first_key = static_cast<int>(now / 2) * kKeys;
    uint32_t hidden[kWords] = {};
    if (partial) hidden_scores(hidden, first_key);
    fence_registers(s);
    ptx::wgmma_fence();
    multiply_rows<T, RowTile, KeyTile>(s, shared_ + offsetof(Shared, q), warp_ / 4 * 64, k);
    ptx::wgmma_commit_group();
    ptx::mbarrier_wait_parity(barrier(offsetof(Shared, full_v), v.stage), v.parity);
    fence_registers(dp);
    ptx::wgmma_fence();  // for the assembler, which else adds it
    multiply_rows<T, RowTile, KeyTile>(dp, shared_ + offsetof(Shared, grad), warp_ / 4 * 64,
                                       keys(offsetof(Shared, v), v.stage));
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // S is there, and so is dQ of the tile before
    fence_registers(s);
    if (before >= 0) release(offsetof(Shared, empty_k), before);
    if (args_.params.alibi_slopes)
      finish_scores<true>(s, dp, hidden, partial, first_key, v.stage);
    else
      finish_scores<false>(s, dp, hidden, partial, first_key, v.stage);
    to_operands<T>(ds, dp);
    fence_registers(ds);
    fence_registers(dq_);
    ptx::wgmma_fence();
    multiply_columns<T, KeyTile>(dq_, ds, k);
    ptx::wgmma_commit_group();
    if constexpr (!kAhead) {
      ptx::wgmma_wait_group<0>();
      fence_registers(dq_);
      release(offsetof(Shared, empty_k), k_stage);
    }
  }

  // S becomes P; waits for dP, which becomes dS.
  template <bool kAlibi>
  INTERNVL_PTX_FN void finish_scores(float (&s)[kScores], float (&dp)[kScores],
                                     const uint32_t (&hidden)[kWords], bool partial, int first_key,
                                     int v_stage) {
    float slope = 0.0f, distance = 0.0f;  // of the lane's first row from its first key
    if (kAlibi) {
      slope = ptx::ld_global_nc(args_.params.alibi_slopes + place_.h);
      const int64_t p = args_.params.query_start
                            ? int64_t{ptx::ld_global_nc(args_.params.query_start + place_.b)}
                            : args_.params.seqlen_k - args_.params.seqlen_q;
      distance = static_cast<float>(p + lane_row() - first_key - lane_ % 4 * 2);
    }
    const tile::ScoreGrad grad{args_.scale_log2, slope * tile::kLog2e};
    const float lse[2] = {of_row(offsetof(Shared, lse_log2), 0),
                          of_row(offsetof(Shared, lse_log2), 8)};
    const auto distance_at = [&](int i) {
      return distance + static_cast<float>(i % 4 / 2 * 8 - i / 4 * 8 - i % 2);
    };
    INTERNVL_UNROLL
    for (int i = 0; i < kScores; ++i)
      s[i] = grad.template probability<kAlibi>(s[i], lse[i % 4 / 2], distance_at(i));
    // For a branch that keeps the wait behind P (see FwdConsumer::take_weights), where the
    // registers allow it; the result does not need it.
    if ((!kAlibi || kHeadDim != 128) && partial) clear_hidden(s, hidden);
    ptx::wgmma_wait_group<0>();
    fence_registers(dp);
    release(offsetof(Shared, empty_v), v_stage);
    const float delta[2] = {of_row(offsetof(Shared, delta), 0), of_row(offsetof(Shared, delta), 8)};
    INTERNVL_UNROLL
    for (int i = 0; i < kScores; ++i) dp[i] = s[i] * (dp[i] - delta[i % 4 / 2]);
    if (partial) clear_hidden(dp, hidden);
    if constexpr (kAlibi) {
      INTERNVL_UNROLL
      for (int i = 0; i < kScores; ++i)
        slope_sum_ = ptx::fma(dp[i], fabsf(distance_at(i)), slope_sum_);
    }
  }

  // Bit 4 n + i: that score is not visible; none is of a row that does not exist, whose position
  // may see keys that no other does. Before the scores exist: the mask's registers are free again
  // by then.
  INTERNVL_PTX_FN void hidden_scores(uint32_t (&hidden)[kWords], int first_key) const {
    const tile::KeyMask own = mask();
    const tile::MaskedQuery rows[2] = {tile::masked_query(own, lane_row()),
                                       tile::masked_query(own, lane_row() + 8)};
    const bool exists[2] = {lane_row() < args_.params.seqlen_q,
                            lane_row() + 8 < args_.params.seqlen_q};
    INTERNVL_UNROLL
    for (int word = 0; word < kWords; ++word) {
      INTERNVL_NO_UNROLL
      for (int n = 0; n < 16; ++n) {
        const int j = first_key + word * 64 + n / 2 * 8 + lane_ % 4 * 2 + n % 2;
        const tile::MaskedKey key = tile::masked_key(own, j);
        const int bit = n / 2 * 4 + n % 2;
        if (!exists[0] || !tile::sees(own, rows[0], key)) hidden[word] |= 1u << bit;
        if (!exists[1] || !tile::sees(own, rows[1], key)) hidden[word] |= 1u << (bit + 2);
      }
    }
  }

  INTERNVL_PTX_FN TileClass classify(int64_t tile) const {
    const tile::KeyMask own = mask();
    const int64_t row_tile = int64_t{place_.tile} * Traits::kRowParts;
    const tile::QueryTile rows =
        tile::query_tile<Traits::kBlockM, Traits::kRowParts>(args_, own, place_.b, row_tile);
    const int64_t j_lo = tile * kKeys, j_hi = smaller(j_lo + kKeys, own.seqlen_k);
    if (args_.row_norms &&
        tile::prune_tiles<Traits::kRowParts, 1>(args_, place_.b, place_.h, row_tile, tile,
                                                tile_distance(rows.p_lo, rows.p_hi, j_lo, j_hi)))
      return kTileEmpty;
    return tile::classify_padded(own, rows, static_cast<int>(tile), kKeys);
  }

  // By the computing warpgroups; each reads and writes its own rows of what was Q.
  INTERNVL_PTX_FN void store() const {
    store_rows<T, RowTile>(dq_, args_.params.softmax_scale, shared_ + offsetof(Shared, q),
                           warp_ / 4 * 64,
                           tile::rows_of(args_.grads.dq, place_.b, place_.h, first_row()),
                           args_.params.seqlen_q - first_row(),
                           static_cast<int>(args_.params.head_dim), args_.aligned_dq);
  }

  INTERNVL_PTX_FN void store_slope_sum() const {
    float total = slope_sum_;
    INTERNVL_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) total += ptx::shfl_bfly(total, mask);
    const uint32_t sums = shared_ + offsetof(Shared, slope_sums);
    if (lane_ == 0) ptx::st_shared(sums + warp_ * 4, total);
    ptx::bar_sync(kConsumerBarrier, kConsumerThreads);
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kConsumerWarps; ++warp)
      total += ptx::ld_shared<float>(sums + warp * 4);
    const int64_t blocks = (args_.params.seqlen_q + kRows - 1) / kRows;
    ptx::st_global(args_.slope_sums + (int64_t{place_.h} * args_.params.batch + place_.b) * blocks +
                       place_.tile,
                   total);
  }

  const BwdPlan& plan_;
  const tile::BwdArgs& args_;
  uint32_t shared_;
  int lane_, warp_;
  tile::BlockPlace place_;
  int32_t items_;
  float slope_sum_ = 0.0f;
  float dq_[kHeadDim / 2] = {};
};

template <class Traits>
__global__ void __launch_bounds__(kThreads, 1)
    prefix_attn_bwd_q_kernel(const INTERNVL_GRID_CONSTANT BwdPlan plan) {
  BwdQ<Traits>(plan).run();
}

}  // namespace internvl::sm90
