// What the two forms of the dK, dV kernel share (prefix_attn_bwd_kv_kernel.cuh): its place and
// shared memory, the copying warp, the list of tiles, the mask, P and dS.
#pragma once

#include "cuda/ptx/registers.cuh"
#include "cuda/sm90/prefix_attn_bwd_steps.cuh"

namespace internvl::sm90 {

template <class Traits>
struct BwdKvShared {
  using KeyTile = tile::PanelTile<Traits::kBlockN, Traits::kHeadDim>;
  using RowTile = tile::PanelTile<Traits::kBlockM, Traits::kHeadDim>;
  alignas(1024) uint8_t k[KeyTile::kBytes];  // later dK
  alignas(1024) uint8_t v[KeyTile::kBytes];  // later dV
  alignas(1024) uint8_t q[Traits::kRowStages][RowTile::kBytes];
  alignas(1024) uint8_t grad[Traits::kRowStages][RowTile::kBytes];
  alignas(16) float lse_log2[Traits::kRowStages][Traits::kBlockM];
  float delta[Traits::kRowStages][Traits::kBlockM];
  uint64_t full[Traits::kRowStages], empty[Traits::kRowStages];
  uint64_t keys_full, landed;
  uint64_t p_full, p_empty;  // kWide: of `exchange`
  alignas(16) ptx::F32x4 exchange[Traits::kWide ? kWarpgroupThreads * Traits::kBlockM / 8 : 1];
  uint32_t tile[Traits::kRowStages];  // twice the item, plus 1 if it needs the mask; kNoMoreTiles
  TileList list;
};

// What a thread of the computing warpgroups holds: S, P, dP or dS of [64 keys, kBlockM queries]; P
// or dS as an operand; a bit per score; dK or dV of 64 keys.
template <class Traits>
using KvScores = float[Traits::kBlockM / 2];
template <class Traits>
using KvOperand = uint32_t[Traits::kBlockM / 16][4];
template <class Traits>
using KvBits = uint32_t[Traits::kBlockM / 64];
template <class Traits>
using KvSums = float[Traits::kHeadDim / 2];

template <class Traits>
class BwdKvBlock {
 public:
  using T = typename Traits::Element;
  using Shared = BwdKvShared<Traits>;
  using KeyTile = typename Shared::KeyTile;
  using RowTile = typename Shared::RowTile;
  using Scores = KvScores<Traits>;
  using Bits = KvBits<Traits>;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kStages = Traits::kRowStages;
  static constexpr uint32_t kStageBytes = 2 * RowTile::kBytes + 2 * kBlockM * 4;

  INTERNVL_PTX_FN explicit BwdKvBlock(const BwdPlan& plan)
      : plan_(plan),
        args_(plan.args),
        shared_(ptx::dynamic_shared()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32) {
    place_ = tile::place_of_block((args_.params.seqlen_k + kBlockN - 1) / kBlockN,
                                  args_.params.batch, args_.params.heads_kv, args_.section_kv);
    items_ = static_cast<int32_t>(args_.row_tiles * args_.group);
    j_lo_ = place_.tile * kBlockN;
  }

  INTERNVL_PTX_FN bool produces() const { return warp_ >= kConsumerWarps; }

  INTERNVL_PTX_FN void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(full(stage), 1);
        ptx::mbarrier_init(empty(stage), kConsumerWarps);
      }
      ptx::mbarrier_init(shared_ + offsetof(Shared, keys_full), 1);
      ptx::mbarrier_init(shared_ + offsetof(Shared, landed), 1);
      if (Traits::kWide) {
        ptx::mbarrier_init(shared_ + offsetof(Shared, p_full), kConsumerWarps / 2);
        ptx::mbarrier_init(shared_ + offsetof(Shared, p_empty), kConsumerWarps / 2);
      }
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
  }

  // By the warps of the copying warpgroup.
  INTERNVL_PTX_FN void produce() const {
    ptx::set_max_registers_dec<kProducerRegisters>();
    if (warp_ == kConsumerWarps && items_ != 0) send_all();
  }

  // By the computing warpgroups: step(tile word, stage) for each tile, which hands the stage back;
  // drain() at the end of each list hands back what is left.
  template <class Step, class Drain>
  INTERNVL_PTX_FN void consume(Step step, Drain drain) const {
    if (items_ == 0) return;
    Slot<kStages> slot;
    for (int32_t first = 0;; first += TileList::kItems) {
      fill_list(shared_ + offsetof(Shared, list), first, items_,
                [&](int64_t item) { return classify(item); });
      if (first == 0) ptx::mbarrier_wait_parity(shared_ + offsetof(Shared, keys_full), 0);
      for (;; slot.next()) {
        ptx::mbarrier_wait_parity(full(slot.stage), slot.parity);
        const auto now = ptx::ld_shared<uint32_t>(tile_word(slot.stage));
        if (now == kNoMoreTiles) break;
        step(now, slot.stage);
      }
      drain();
      release(slot.stage);
      slot.next();
      if (first >= items_ - TileList::kItems) return;
    }
  }

  // ---- steps of the computing warpgroups ----

  INTERNVL_PTX_FN int lane() const { return lane_; }
  INTERNVL_PTX_FN int warp() const { return warp_; }
  INTERNVL_PTX_FN uint32_t at(size_t member) const {
    return shared_ + static_cast<uint32_t>(member);
  }
  INTERNVL_PTX_FN uint32_t q(int stage) const {
    return shared_ + offsetof(Shared, q) + stage * RowTile::kBytes;
  }
  INTERNVL_PTX_FN uint32_t grad(int stage) const {
    return shared_ + offsetof(Shared, grad) + stage * RowTile::kBytes;
  }
  INTERNVL_PTX_FN uint32_t floats(size_t member, int stage) const {
    return at(member) + stage * kBlockM * 4;
  }
  // The lane's first one of its query rows' deltas, of which it has two of every eight.
  INTERNVL_PTX_FN uint32_t lane_delta(int stage) const {
    return floats(offsetof(Shared, delta), stage) + lane_ % 4 * 8;
  }

  // The warp no longer reads the stage.
  INTERNVL_PTX_FN void release(int stage) const {
    ptx::sync_warp();
    if (lane_ == 0) ptx::mbarrier_arrive(empty(stage));
  }

  // c = the warpgroup's keys in `member` times rows^T. One batch, not committed.
  INTERNVL_PTX_FN void multiply_keys(Scores& c, size_t member, uint32_t rows) const {
    multiply_rows<T, KeyTile, RowTile>(c, at(member), first_key(), rows);
  }

  // Scores [keys, queries] become P.
  INTERNVL_PTX_FN void probabilities(Scores& s, uint32_t item, int stage) const {
    const tile::ScoreGrad grad{args_.scale_log2, 0.0f};
    if (!args_.params.alibi_slopes) return probabilities<false>(s, grad, 0.0f, stage);
    const float slope = ptx::ld_global_nc(args_.params.alibi_slopes + head(item));
    const int64_t p = args_.params.query_start
                          ? int64_t{ptx::ld_global_nc(args_.params.query_start + place_.b)}
                          : args_.params.seqlen_k - args_.params.seqlen_q;
    // Of the lane's first query from its first key.
    const auto distance =
        static_cast<float>(p + row_tile(item) * kBlockM + lane_ % 4 * 2 - lane_key());
    probabilities<true>(s, {args_.scale_log2, slope * tile::kLog2e}, distance, stage);
  }

  // dP becomes dS.
  INTERNVL_PTX_FN void score_grads(Scores& dp, const Scores& p, int stage) const {
    const uint32_t at = lane_delta(stage);
    INTERNVL_UNROLL
    for (int n = 0; n < kBlockM / 8; ++n) {
      const auto delta = ptx::ld_shared<ptx::F32x2>(at + n * 32);
      INTERNVL_UNROLL
      for (int i = 0; i < 4; ++i)
        dp[4 * n + i] = p[4 * n + i] * (dp[4 * n + i] - (i % 2 ? delta.y : delta.x));
    }
  }

  // Bit 4 n + i: that score is not visible; none is of a row that does not exist, whose position
  // may see keys that no other does. Before the scores exist: the mask's registers are free again
  // by then.
  INTERNVL_PTX_FN void hidden_scores(Bits& hidden, uint32_t item) const {
    const tile::KeyMask own = mask();
    const tile::MaskedKey keys[2] = {tile::masked_key(own, lane_key()),
                                     tile::masked_key(own, lane_key() + 8)};
    const int first_row = row_tile(item) * kBlockM;
    INTERNVL_UNROLL
    for (int word = 0; word < kBlockM / 64; ++word) {
      INTERNVL_NO_UNROLL
      for (int n = 0; n < 16; ++n) {
        const int row = first_row + word * 64 + n / 2 * 8 + lane_ % 4 * 2 + n % 2;
        const tile::MaskedQuery query = tile::masked_query(own, row);
        const int bit = n / 2 * 4 + n % 2;
        const bool exists = row < args_.params.seqlen_q;
        if (!exists || !tile::sees(own, query, keys[0])) hidden[word] |= 1u << bit;
        if (!exists || !tile::sees(own, query, keys[1])) hidden[word] |= 1u << (bit + 2);
      }
    }
  }

  // By a warpgroup, through its rows of `member`, which nobody else reads any more.
  INTERNVL_PTX_FN void store_dk(const KvSums<Traits>& dk, size_t member) const {
    store(dk, args_.params.softmax_scale, member, args_.grads.dk, args_.aligned_dk);
  }
  INTERNVL_PTX_FN void store_dv(const KvSums<Traits>& dv, size_t member) const {
    store(dv, 1.0f, member, args_.grads.dv, args_.aligned_dv);
  }

 private:
  INTERNVL_PTX_FN uint32_t full(int stage) const {
    return shared_ + offsetof(Shared, full) + stage * 8;
  }
  INTERNVL_PTX_FN uint32_t empty(int stage) const {
    return shared_ + offsetof(Shared, empty) + stage * 8;
  }
  INTERNVL_PTX_FN uint32_t tile_word(int stage) const {
    return shared_ + offsetof(Shared, tile) + stage * 4;
  }

  INTERNVL_PTX_FN int row_tile(uint32_t item) const {
    return static_cast<int>(item % static_cast<uint32_t>(args_.row_tiles));
  }
  INTERNVL_PTX_FN int head(uint32_t item) const {
    return static_cast<int>(place_.h * args_.group + item / static_cast<uint32_t>(args_.row_tiles));
  }

  INTERNVL_PTX_FN tile::KeyMask mask() const {
    return tile::key_mask(args_.params, args_.keys, args_.key_tiles, place_.b);
  }

  // ---- the producing warp ----

  INTERNVL_PTX_FN void send_all() const {
    if (lane_ == 0) {
      const uint32_t barrier = shared_ + offsetof(Shared, keys_full);
      ptx::mbarrier_arrive_expect_tx(barrier, 2 * KeyTile::kBytes);
      load_tile<KeyTile>(shared_ + offsetof(Shared, k), &plan_.k, j_lo_, place_.h, place_.b,
                         barrier);
      load_tile<KeyTile>(shared_ + offsetof(Shared, v), &plan_.v, j_lo_, place_.h, place_.b,
                         barrier);
    }
    Slot<kStages> slot;
    uint32_t landed_parity = 0;
    for (int32_t first = 0;; first += TileList::kItems) {
      walk_list(shared_ + offsetof(Shared, list), first, [&](int32_t item, bool partial) {
        ptx::mbarrier_wait_parity(empty(slot.stage), slot.parity ^ 1);
        send(static_cast<uint32_t>(item), partial, slot.stage, landed_parity);
        slot.next();
      });
      ptx::mbarrier_wait_parity(empty(slot.stage), slot.parity ^ 1);
      ptx::sync_warp();  // the list has been read
      if (lane_ == 0) {
        ptx::st_shared(tile_word(slot.stage), uint32_t{kNoMoreTiles});
        ptx::mbarrier_arrive(full(slot.stage));
      }
      slot.next();
      if (first >= items_ - TileList::kItems) return;  // no sum beyond 31 bits
    }
  }

  INTERNVL_PTX_FN void send(uint32_t item, bool partial, int stage, uint32_t& landed_parity) const {
    const int row = row_tile(item) * kBlockM, own_head = head(item);
    const int64_t place =
        (int64_t{place_.b} * args_.params.heads_q + own_head) * args_.padded_rows + row;
    const bool clear = partial && any_row_without_gradient(place, row);
    const uint32_t barrier = clear ? shared_ + offsetof(Shared, landed) : full(stage);
    if (lane_ == 0) {
      ptx::st_shared(tile_word(stage), item * 2 + (partial ? 1u : 0u));
      ptx::mbarrier_arrive_expect_tx(barrier, kStageBytes);
      load_tile<RowTile>(q(stage), &plan_.q, row, own_head, place_.b, barrier);
      load_tile<RowTile>(grad(stage), &plan_.grad_out, row, own_head, place_.b, barrier);
      ptx::bulk_load(floats(offsetof(Shared, lse_log2), stage), args_.lse_log2 + place, kBlockM * 4,
                     barrier);
      ptx::bulk_load(floats(offsetof(Shared, delta), stage), args_.delta + place, kBlockM * 4,
                     barrier);
    }
    if (!clear) return;
    ptx::mbarrier_wait_parity(barrier, landed_parity);
    landed_parity ^= 1;
    const uint32_t lse = floats(offsetof(Shared, lse_log2), stage);
    const auto empty_row = [&](int r) { return ptx::ld_shared<float>(lse + r * 4) == INFINITY; };
    clear_rows<RowTile>(q(stage), empty_row);
    clear_rows<RowTile>(grad(stage), empty_row);
    ptx::fence_proxy_async_shared();
    ptx::sync_warp();
    if (lane_ == 0) ptx::mbarrier_arrive(full(stage));
  }

  // Of the rows that exist: those beyond the last are zeros already.
  INTERNVL_PTX_FN bool any_row_without_gradient(int64_t place, int row) const {
    bool any = false;
    for (int r = lane_; r < kBlockM; r += 32)
      any |= row + r < args_.params.seqlen_q &&
             ptx::ld_global_nc(args_.lse_log2 + place + r) == INFINITY;
    return ptx::vote_any(any);
  }

  // ---- the computing warpgroups ----

  // Of the warpgroup, in the block's tile.
  INTERNVL_PTX_FN int first_key() const { return Traits::kWide ? 0 : warp_ / 4 * 64; }
  INTERNVL_PTX_FN int lane_key() const { return j_lo_ + first_key() + warp_ % 4 * 16 + lane_ / 4; }

  // Class of (query head, query tile) number `item` against the block's keys.
  INTERNVL_PTX_FN TileClass classify(int64_t item) const {
    const tile::KeyMask own = mask();
    const int row = row_tile(static_cast<uint32_t>(item));
    const tile::QueryTile rows = tile::query_tile<kBlockM, 1>(args_, own, place_.b, row);
    const int64_t j_hi = smaller(int64_t{j_lo_} + kBlockN, own.seqlen_k);
    const int64_t key_tile = int64_t{place_.tile} * Traits::kKeyParts;
    if (args_.row_norms && tile::prune_tiles<1, Traits::kKeyParts>(
                               args_, place_.b, head(static_cast<uint32_t>(item)), row, key_tile,
                               tile_distance(rows.p_lo, rows.p_hi, j_lo_, j_hi)))
      return kTileEmpty;
    const KeyTileSummary keys =
        tile::merged_summary<Traits::kKeyParts>(own, key_tile, args_.key_tiles);
    return tile::classify_keys(own, rows, keys, j_lo_, j_hi);
  }

  template <bool kAlibi>
  INTERNVL_PTX_FN void probabilities(Scores& s, const tile::ScoreGrad& grad, float distance,
                                     int stage) const {
    const uint32_t at = floats(offsetof(Shared, lse_log2), stage) + lane_ % 4 * 8;
    INTERNVL_UNROLL
    for (int n = 0; n < kBlockM / 8; ++n) {
      const auto lse = ptx::ld_shared<ptx::F32x2>(at + n * 32);
      INTERNVL_UNROLL
      for (int i = 0; i < 4; ++i)
        s[4 * n + i] = grad.template probability<kAlibi>(
            s[4 * n + i], i % 2 ? lse.y : lse.x,
            distance + static_cast<float>(n * 8 + i % 2 - i / 2 * 8));
    }
  }

  INTERNVL_PTX_FN void store(const KvSums<Traits>& sum, float factor, size_t member, const View& to,
                             bool aligned) const {
    store_rows<T, KeyTile>(
        sum, factor, at(member), first_key(), tile::rows_of(to, place_.b, place_.h, j_lo_),
        args_.params.seqlen_k - j_lo_, static_cast<int>(args_.params.head_dim), aligned);
  }

  const BwdPlan& plan_;
  const tile::BwdArgs& args_;
  uint32_t shared_;
  int lane_, warp_;
  tile::BlockPlace place_;
  int32_t items_, j_lo_;
};

}  // namespace internvl::sm90
