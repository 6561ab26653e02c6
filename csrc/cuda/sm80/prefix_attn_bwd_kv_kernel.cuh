// Backward of prefix_attn, dK and dV. Per visible (i, j) of every query head of the group:
//   P = exp(score - lse), dS = P * (dO V^T - delta), dV += P^T dO, dK += softmax_scale * dS^T Q.
// Meaning: semantics.py, reference.py.
//
// Grid: x = (tile of kBlockN keys, batch row, KV head); first key tiles first: causal ones are the
// longest. A block walks over (query head of the group, tile of kBlockM query rows) in a fixed
// order and adds everything up itself: no atomics, the same bits every time.
// Everything is held transposed: a warp computes S^T = K Q^T and dP^T = V dO^T for its 16 kRowTiles
// keys, so that P^T and dS^T are, in registers, the A operands of dV and dK. With kSplit = 2 two
// warps share their keys: each computes the scores of half of the queries, they exchange the
// fragments through shared memory (named barrier 1 + pair), and each owns half of the columns.
// Pipeline: Q, dO, lse and delta of the next tile arrive by cp.async in the other stage while this
// one is worked on; one barrier per tile.
// Shared memory: see SharedStorage; 128 KiB at kHeadDim 128 and 256.
// Not here: dQ, slopes (prefix_attn_bwd_q_kernel.cuh); head dims above 256.
#pragma once

#include "cuda/sm80/prefix_attn_bwd_steps.cuh"

namespace internvl::sm80 {

template <class Traits>
struct BwdKvShared {
  static constexpr int kFragments =
      2 * Traits::kRowTiles * (Traits::kStep / 16);  // P, dS of a warp
  // Steps of a tile use the exchange in turns; the barrier between tiles parts the first and last.
  static constexpr int kTurns = Traits::kBlockM > Traits::kStep* Traits::kSplit ? 2 : 1;
  uint16_t k[Traits::kBlockN][Traits::kHeadDim];  // later dK
  uint16_t v[Traits::kBlockN][Traits::kHeadDim];  // later dV
  uint16_t q[2][Traits::kBlockM][Traits::kHeadDim];
  uint16_t grad[2][Traits::kBlockM][Traits::kHeadDim];
  float lse_log2[2][Traits::kBlockM];
  float delta[2][Traits::kBlockM];
  ptx::U32x4 exchange[Traits::kSplit > 1 ? kTurns * Traits::kKvThreads * kFragments : 1];
  typename TileList<Traits::kKvThreads>::Shared list;
};

// A query tile on its way.
struct RowTile {
  int32_t tile, head;
};

template <class Traits>
class BwdKv {
 public:
  using T = typename Traits::Element;
  using Layout = typename Traits::Layout;
  using Shared = BwdKvShared<Traits>;
  static constexpr int kThreads = Traits::kKvThreads;
  static constexpr int kHeadDim = Traits::kHeadDim, kPitch = Traits::kPitchBytes;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kM = Traits::kRowTiles, kSplit = Traits::kSplit, kStep = Traits::kStep;
  static constexpr int kStepTiles = kStep / 16;  // 16-query pieces of a step
  static constexpr int kColumns8 = kHeadDim / 8 / kSplit;
  static constexpr uint32_t kTileBytes = kBlockM * kPitch;

  INTERNVL_PTX_FN BwdKv(const BwdArgs& args)
      : args_(args),
        shared_(ptx::dynamic_shared()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        split_(warp_ % kSplit),
        first_key_(warp_ / kSplit * 16 * kM),
        place_(place_of_block((args.params.seqlen_k + kBlockN - 1) / kBlockN, args.params.batch,
                              args.params.heads_kv, args.section_kv)),
        j_lo_(static_cast<int32_t>(place_.tile * kBlockN)) {}

  INTERNVL_PTX_FN void run() {
    load_keys();
    TileList<kThreads> list(shared_ + offsetof(Shared, list), args_.row_tiles * args_.group);
    const auto classify_item = [&](int64_t item) { return classify(item); };
    bool more = list.next(classify_item);
    if (more) load_rows(row_tile(list.item), 0);
    ptx::cp_async_commit_group();
    for (int stage = 0; more; stage ^= 1) {
      const uint32_t now = static_cast<uint32_t>(list.item) * 2 + (list.partial ? 1 : 0);
      ptx::cp_async_wait_group<0>();
      // Everybody's copies have arrived, and nobody reads the other stage any more.
      if (ptx::sync_threads_or(any_row_without_gradient(stage))) clear_rows(stage);
      more = list.next(classify_item);
      if (more) load_rows(row_tile(list.item), stage ^ 1);
      ptx::cp_async_commit_group();
      accumulate(now, stage);
    }
    ptx::cp_async_wait_group<0>();
    ptx::sync_threads();
    store();
  }

 private:
  INTERNVL_PTX_FN tile::KeyMask mask() const {
    return tile::key_mask(args_.params, args_.keys, args_.key_tiles, place_.b);
  }

  INTERNVL_PTX_FN RowTile row_tile(uint32_t item) const {
    const auto tiles = static_cast<uint32_t>(args_.row_tiles);
    return {static_cast<int32_t>(item % tiles),
            static_cast<int32_t>(place_.h * args_.group + item / tiles)};
  }

  // K and V of the block; keys that no query sees stay zero.
  INTERNVL_PTX_FN void load_keys() {
    const tile::TileCopy<kHeadDim, kBlockN, kThreads> copy(static_cast<int>(threadIdx.x));
    const tile::KeyMask own = mask();
    const int head_dim = static_cast<int>(args_.params.head_dim);
    const auto keep = [&](int row) { return tile::needs_key(own, j_lo_ + row); };
    copy.load(shared_ + offsetof(Shared, k),
              tile::rows_of(args_.params.k, place_.b, place_.h, j_lo_), head_dim, keep);
    copy.load(shared_ + offsetof(Shared, v),
              tile::rows_of(args_.params.v, place_.b, place_.h, j_lo_), head_dim, keep);
  }

  INTERNVL_PTX_FN void load_rows(const RowTile& rows, int stage) {
    const tile::TileCopy<kHeadDim, kBlockM, kThreads> copy(static_cast<int>(threadIdx.x));
    const int64_t first = int64_t{rows.tile} * kBlockM;
    const int64_t count = args_.params.seqlen_q - first;
    const int head_dim = static_cast<int>(args_.params.head_dim);
    const auto keep = [&](int row) { return row < count; };
    copy.load(shared_ + offsetof(Shared, q) + stage * kTileBytes,
              tile::rows_of(args_.params.q, place_.b, rows.head, first), head_dim, keep);
    copy.load(shared_ + offsetof(Shared, grad) + stage * kTileBytes,
              tile::rows_of(args_.grads.grad_out, place_.b, rows.head, first), head_dim, keep);
    const int64_t place = (place_.b * args_.params.heads_q + rows.head) * args_.padded_rows + first;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kBlockM / 4) {
      const uint32_t at = stage * kBlockM * 4 + thread * 16;
      ptx::cp_async_cg_16(shared_ + offsetof(Shared, lse_log2) + at,
                          args_.lse_log2 + place + thread * 4, 16);
      ptx::cp_async_cg_16(shared_ + offsetof(Shared, delta) + at, args_.delta + place + thread * 4,
                          16);
    }
  }

  // Of the rows whose lse this thread copied itself.
  INTERNVL_PTX_FN bool any_row_without_gradient(int stage) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kBlockM / 4) return false;
    const auto lse = ptx::ld_shared<ptx::F32x4>(shared_ + offsetof(Shared, lse_log2) +
                                                stage * kBlockM * 4 + thread * 16);
    return lse.x == INFINITY || lse.y == INFINITY || lse.z == INFINITY || lse.w == INFINITY;
  }

  // Rows without a visible key carry no gradient, whatever stands in them: 0 * NaN must not arise.
  INTERNVL_PTX_FN void clear_rows(int stage) {
    const uint32_t tile = stage * kTileBytes;
    INTERNVL_NO_UNROLL  // seldom: no registers for it through the main loop
        for (int n = static_cast<int>(threadIdx.x); n < kBlockM * Layout::kChunks; n += kThreads) {
      const int row = n / Layout::kChunks;
      if (lse_at(stage, row) != INFINITY) continue;
      const uint32_t at = tile + Layout::offset(row, n % Layout::kChunks);
      ptx::st_shared(shared_ + offsetof(Shared, q) + at, ptx::U32x4{0, 0, 0, 0});
      ptx::st_shared(shared_ + offsetof(Shared, grad) + at, ptx::U32x4{0, 0, 0, 0});
    }
    ptx::sync_threads();
  }

  INTERNVL_PTX_FN float lse_at(int stage, int row) const {
    return ptx::ld_shared<float>(shared_ + offsetof(Shared, lse_log2) +
                                 (stage * kBlockM + row) * 4);
  }

  // Class of (query head, query tile) number `item` against the block's keys.
  INTERNVL_PTX_FN TileClass classify(int64_t item) const {
    const tile::KeyMask own = mask();
    const auto tiles = static_cast<uint32_t>(args_.row_tiles);
    const int64_t tile = static_cast<uint32_t>(item) % tiles;
    const int64_t head = place_.h * args_.group + static_cast<uint32_t>(item) / tiles;
    const tile::QueryTile rows = query_tile<kBlockM, 1>(args_, own, place_.b, tile);
    const int64_t j_hi = smaller(int64_t{j_lo_} + kBlockN, own.seqlen_k);
    if (args_.row_norms && tile::prune_tiles<1, Traits::kKeyParts>(
                               args_, place_.b, head, tile, place_.tile * Traits::kKeyParts,
                               tile_distance(rows.p_lo, rows.p_hi, j_lo_, j_hi)))
      return kTileEmpty;
    return tile::classify_keys(own, rows, key_summary(own), j_lo_, j_hi);
  }

  INTERNVL_PTX_FN KeyTileSummary key_summary(const tile::KeyMask& own) const {
    return merged_summary<Traits::kKeyParts>(own, place_.tile * Traits::kKeyParts, args_.key_tiles);
  }

  // `now`: twice the item, plus 1 if it needs the mask; one register through the products.
  INTERNVL_PTX_FN void accumulate(uint32_t now, int stage) {
    const uint32_t sQ = shared_ + offsetof(Shared, q) + stage * kTileBytes;
    const uint32_t sGrad = shared_ + offsetof(Shared, grad) + stage * kTileBytes;
    const uint32_t own = first_key_ * kPitch + Layout::a(lane_);
    INTERNVL_NO_UNROLL  // the addresses of one step at a time: registers are short
        for (int step = 0; step < kBlockM; step += kStep * kSplit) {
      const int first = step + split_ * kStep;  // of this warp's queries in the tile
      // Before the scores exist: the mask's registers are free again by then.
      const uint32_t hidden =
          now % 2 != 0 ? hidden_scores(int64_t{row_tile(now / 2).tile} * kBlockM + first) : 0;
      float s[kM][2 * kStepTiles][4] = {}, dp[kM][2 * kStepTiles][4] = {};
      const uint32_t theirs = first * kPitch + Layout::b(lane_);
      multiply_rows<Traits, kM, kStepTiles>(s, shared_ + offsetof(Shared, k) + own, sQ + theirs);
      multiply_rows<Traits, kM, kStepTiles>(dp, shared_ + offsetof(Shared, v) + own,
                                            sGrad + theirs);
      score_grads(s, dp, now / 2, stage, first);
      if (hidden != 0) clear_hidden(s, dp, hidden);
      uint32_t p[kM][kStepTiles][4], ds[kM][kStepTiles][4];
      INTERNVL_UNROLL
      for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
      for (int n = 0; n < kStepTiles; ++n) {
        tile::to_operand<T>(p[m][n], s[m][2 * n], s[m][2 * n + 1]);
        tile::to_operand<T>(ds[m][n], dp[m][2 * n], dp[m][2 * n + 1]);
      }
      const uint32_t columns = Layout::a(lane_) + split_ * (kPitch / kSplit);
      if constexpr (kSplit == 1) {
        add_products(p, ds, sQ + columns + step * kPitch, sGrad + columns + step * kPitch);
      } else {
        const int turn = step / (kStep * kSplit) % Shared::kTurns;
        put_fragments(p, ds, turn);
        ptx::bar_sync(1 + warp_ / kSplit, 32 * kSplit);
        INTERNVL_UNROLL
        for (int part = 0; part < kSplit; ++part) {
          get_fragments(p, ds, turn, warp_ / kSplit * kSplit + part);
          const uint32_t at = columns + (step + part * kStep) * kPitch;
          add_products(p, ds, sQ + at, sGrad + at);
        }
      }
    }
  }

  INTERNVL_PTX_FN void add_products(const uint32_t (&p)[kM][kStepTiles][4],
                                    const uint32_t (&ds)[kM][kStepTiles][4], uint32_t q,
                                    uint32_t grad) {
    INTERNVL_UNROLL
    for (int n = 0; n < kStepTiles; ++n) {
      uint32_t a[kM][4], b[kM][4];
      INTERNVL_UNROLL
      for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
      for (int i = 0; i < 4; ++i) {
        a[m][i] = p[m][n][i];
        b[m][i] = ds[m][n][i];
      }
      multiply_columns<Traits, kM, kColumns8>(dv_, a, grad + n * 16 * kPitch);
      multiply_columns<Traits, kM, kColumns8>(dk_, b, q + n * 16 * kPitch);
    }
  }

  // s, dp [keys, queries] become P and dS.
  INTERNVL_PTX_FN void score_grads(float (&s)[kM][2 * kStepTiles][4],
                                   float (&dp)[kM][2 * kStepTiles][4], uint32_t item, int stage,
                                   int first) const {
    if (args_.params.alibi_slopes) {
      const RowTile rows = row_tile(item);
      const float slope = ptx::ld_global_nc(args_.params.alibi_slopes + rows.head);
      apply<true>(s, dp, {args_.scale_log2, slope * tile::kLog2e}, rows.tile, stage, first);
    } else {
      apply<false>(s, dp, {args_.scale_log2, 0.0f}, 0, stage, first);
    }
  }

  template <bool kAlibi>
  INTERNVL_PTX_FN void apply(float (&s)[kM][2 * kStepTiles][4], float (&dp)[kM][2 * kStepTiles][4],
                             const ScoreGrad& grad, int64_t row_tile, int stage, int first) const {
    float distance = 0.0f;  // of the lane's first query from its first key
    if (kAlibi) {
      const int64_t p = args_.params.query_start
                            ? int64_t{ptx::ld_global_nc(args_.params.query_start + place_.b)}
                            : args_.params.seqlen_k - args_.params.seqlen_q;
      distance = static_cast<float>(p + row_tile * kBlockM + first + lane_ % 4 * 2 - j_lo_ -
                                    first_key_ - lane_ / 4);
    }
    const uint32_t at = (stage * kBlockM + first + lane_ % 4 * 2) * 4;
    INTERNVL_UNROLL
    for (int n = 0; n < 2 * kStepTiles; ++n) {
      const auto lse =
          ptx::ld_shared<ptx::F32x2>(shared_ + offsetof(Shared, lse_log2) + at + n * 32);
      const auto delta =
          ptx::ld_shared<ptx::F32x2>(shared_ + offsetof(Shared, delta) + at + n * 32);
      INTERNVL_UNROLL
      for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
      for (int i = 0; i < 4; ++i)
        grad.template apply<kAlibi>(
            s[m][n][i], dp[m][n][i], i % 2 ? lse.y : lse.x, i % 2 ? delta.y : delta.x,
            distance + static_cast<float>(n * 8 + i % 2 - m * 16 - i / 2 * 8));
    }
  }

  // Bit (m * 2 kStepTiles + n) * 4 + i: score i of tile (m, n) is not visible. `first_row` is the
  // first query of the step.
  INTERNVL_PTX_FN uint32_t hidden_scores(int64_t first_row) const {
    static_assert(kM * 2 * kStepTiles * 4 <= 32, "a bit per score of a lane");
    const tile::KeyMask own = mask();
    MaskedKey keys[kM][2];
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
    for (int half = 0; half < 2; ++half)
      keys[m][half] = masked_key(own, j_lo_ + first_key_ + m * 16 + half * 8 + lane_ / 4);
    uint32_t hidden = 0;
    INTERNVL_UNROLL
    for (int n = 0; n < 2 * kStepTiles; ++n) INTERNVL_UNROLL
    for (int e = 0; e < 2; ++e) {
      const MaskedQuery query = masked_query(own, first_row + n * 8 + lane_ % 4 * 2 + e);
      INTERNVL_UNROLL
      for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
      for (int half = 0; half < 2; ++half)
        if (!tile::sees(own, query, keys[m][half]))
          hidden |= 1u << ((m * 2 * kStepTiles + n) * 4 + half * 2 + e);
    }
    return hidden;
  }

  INTERNVL_PTX_FN static void clear_hidden(float (&s)[kM][2 * kStepTiles][4],
                                           float (&dp)[kM][2 * kStepTiles][4], uint32_t hidden) {
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
    for (int n = 0; n < 2 * kStepTiles; ++n) INTERNVL_UNROLL
    for (int i = 0; i < 4; ++i)
      if (hidden >> ((m * 2 * kStepTiles + n) * 4 + i) & 1) s[m][n][i] = dp[m][n][i] = 0.0f;
  }

  // Fragments of all warps: [turn][warp][P, dS of (m, n)][lane].
  INTERNVL_PTX_FN uint32_t fragment(int turn, int warp, int m, int n) const {
    return shared_ + offsetof(Shared, exchange) +
           (((turn * (kThreads / 32) + warp) * Shared::kFragments + 2 * (m * kStepTiles + n)) * 32 +
            lane_) *
               16;
  }

  INTERNVL_PTX_FN void put_fragments(const uint32_t (&p)[kM][kStepTiles][4],
                                     const uint32_t (&ds)[kM][kStepTiles][4], int turn) const {
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
    for (int n = 0; n < kStepTiles; ++n) {
      const uint32_t at = fragment(turn, warp_, m, n);
      ptx::st_shared(at, ptx::U32x4{p[m][n][0], p[m][n][1], p[m][n][2], p[m][n][3]});
      ptx::st_shared(at + 512, ptx::U32x4{ds[m][n][0], ds[m][n][1], ds[m][n][2], ds[m][n][3]});
    }
  }

  INTERNVL_PTX_FN void get_fragments(uint32_t (&p)[kM][kStepTiles][4],
                                     uint32_t (&ds)[kM][kStepTiles][4], int turn, int warp) const {
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
    for (int n = 0; n < kStepTiles; ++n) {
      const uint32_t at = fragment(turn, warp, m, n);
      const auto a = ptx::ld_shared<ptx::U32x4>(at);
      const auto b = ptx::ld_shared<ptx::U32x4>(at + 512);
      p[m][n][0] = a.x, p[m][n][1] = a.y, p[m][n][2] = a.z, p[m][n][3] = a.w;
      ds[m][n][0] = b.x, ds[m][n][1] = b.y, ds[m][n][2] = b.z, ds[m][n][3] = b.w;
    }
  }

  INTERNVL_PTX_FN void store() const {
    const int chunk = split_ * kColumns8;
    stage_rows<Traits>(dk_, args_.params.softmax_scale, shared_ + offsetof(Shared, k), first_key_,
                       chunk);
    stage_rows<Traits>(dv_, 1.0f, shared_ + offsetof(Shared, v), first_key_, chunk);
    ptx::sync_threads();
    const int64_t rows = args_.params.seqlen_k - j_lo_;
    const int head_dim = static_cast<int>(args_.params.head_dim);
    store_rows<Traits, kBlockN, kThreads>(shared_ + offsetof(Shared, k),
                                          tile::rows_of(args_.grads.dk, place_.b, place_.h, j_lo_),
                                          rows, head_dim, args_.aligned_dk);
    store_rows<Traits, kBlockN, kThreads>(shared_ + offsetof(Shared, v),
                                          tile::rows_of(args_.grads.dv, place_.b, place_.h, j_lo_),
                                          rows, head_dim, args_.aligned_dv);
  }

  const BwdArgs& args_;
  uint32_t shared_;
  int lane_, warp_, split_, first_key_;
  BlockPlace place_;
  int32_t j_lo_;
  float dk_[kM][kColumns8][4] = {};
  float dv_[kM][kColumns8][4] = {};
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kKvThreads, Traits::kMinBlocks)
    prefix_attn_bwd_kv_kernel(const BwdArgs args) {
  BwdKv<Traits>(args).run();
}

}  // namespace internvl::sm80
