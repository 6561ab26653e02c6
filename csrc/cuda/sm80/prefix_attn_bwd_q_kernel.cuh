// Backward of prefix_attn, dQ and the gradient of the slopes. Per visible (i, j):
//   P = exp(score - lse), dS = P * (dO V^T - delta), dQ += softmax_scale * dS K,
//   dalibi_slopes[h] -= dS * |p - j|.
// Meaning: semantics.py, reference.py.
//
// Grid: x = (tile of kBlockRows query rows, batch row, query head); last rows first: causal ones
// are the longest. A block keeps its Q and dO in shared memory and walks over tiles of kBlockKeys
// keys. A warp computes S = Q K^T and dP = dO V^T for its 16 kQRowTiles rows; dS is, in registers,
// the A operand of dQ. With kQSplit = 2 two warps share their rows and each takes half of the keys;
// their sums meet in shared memory at the end. The slopes' sum of a block is added up by shuffles
// in a fixed order and goes to args.slope_sums. Pipeline: K and V of the next tile arrive by
// cp.async in the other stage; one barrier per tile. Shared memory: see SharedStorage; 128 KiB at
// kHeadDim 128 and 256.
#pragma once

#include "cuda/sm80/prefix_attn_bwd_steps.cuh"

namespace internvl::sm80 {

template <class Traits>
struct BwdQShared {
  uint16_t q[Traits::kBlockRows][Traits::kHeadDim];  // later dQ; with grad, the halves of dQ
  uint16_t grad[Traits::kBlockRows][Traits::kHeadDim];
  uint16_t k[2][Traits::kBlockKeys][Traits::kHeadDim];
  uint16_t v[2][Traits::kBlockKeys][Traits::kHeadDim];
  float slope_sums[Traits::kQThreads / 32];
  typename TileList<Traits::kQThreads>::Shared list;
};

template <class Traits>
class BwdQ {
 public:
  using T = typename Traits::Element;
  using Layout = typename Traits::Layout;
  using Shared = BwdQShared<Traits>;
  static constexpr int kThreads = Traits::kQThreads;
  static constexpr int kHeadDim = Traits::kHeadDim, kPitch = Traits::kPitchBytes;
  static constexpr int kRows = Traits::kBlockRows, kKeys = Traits::kBlockKeys;
  static constexpr int kM = Traits::kQRowTiles, kSplit = Traits::kQSplit, kStep = Traits::kQStep;
  static constexpr int kStepTiles = kStep / 16;
  static constexpr uint32_t kTileBytes = kKeys * kPitch;

  INTERNVL_PTX_FN BwdQ(const BwdArgs& args)
      : args_(args),
        shared_(ptx::dynamic_shared()),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) / 32),
        split_(warp_ % kSplit),
        first_row_(warp_ / kSplit * 16 * kM) {
    const int64_t tiles = (args.params.seqlen_q + kRows - 1) / kRows;
    place_ = place_of_block(tiles, args.params.batch, args.params.heads_q, args.section_q);
    place_.tile = static_cast<int32_t>(tiles) - 1 - place_.tile;
    head_kv_ = static_cast<int32_t>(place_.h / args.group);
  }

  INTERNVL_PTX_FN void run() {
    load_rows();
    TileList<kThreads> list(shared_ + offsetof(Shared, list), args_.key_tiles);
    const auto classify_item = [&](int64_t item) { return classify(item); };
    bool more = list.next(classify_item);
    if (more) load_keys(list.item, 0);
    ptx::cp_async_commit_group();
    for (int stage = 0; more; stage ^= 1) {
      const int32_t tile = list.item;
      const bool partial = list.partial;
      ptx::cp_async_wait_group<0>();
      ptx::sync_threads();  // everybody's copies are there; nobody reads the other stage any more
      more = list.next(classify_item);
      if (more) load_keys(list.item, stage ^ 1);
      ptx::cp_async_commit_group();
      accumulate(tile, partial, stage);
    }
    ptx::cp_async_wait_group<0>();
    ptx::sync_threads();
    if (kSplit > 1) add_halves();
    store();
    if (args_.slope_sums) store_slope_sum();
  }

 private:
  INTERNVL_PTX_FN tile::KeyMask mask() const {
    return tile::key_mask(args_.params, args_.keys, args_.key_tiles, place_.b);
  }

  INTERNVL_PTX_FN int64_t head() const { return place_.b * args_.params.heads_q + place_.h; }

  // Q and dO, and the lane's lse and delta.
  INTERNVL_PTX_FN void load_rows() {
    const tile::TileCopy<kHeadDim, kRows, kThreads> copy(static_cast<int>(threadIdx.x));
    const int64_t first = int64_t{place_.tile} * kRows;
    const int64_t count = args_.params.seqlen_q - first;
    const int head_dim = static_cast<int>(args_.params.head_dim);
    const auto keep = [&](int row) { return row < count; };
    copy.load(shared_ + offsetof(Shared, q),
              tile::rows_of(args_.params.q, place_.b, place_.h, first), head_dim, keep);
    copy.load(shared_ + offsetof(Shared, grad),
              tile::rows_of(args_.grads.grad_out, place_.b, place_.h, first), head_dim, keep);
    const int64_t place = head() * args_.padded_rows + first + first_row_ + lane_ / 4;
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
    for (int half = 0; half < 2; ++half) {
      lse_[m][half] = ptx::ld_global_nc(args_.lse_log2 + place + m * 16 + half * 8);
      delta_[m][half] = ptx::ld_global_nc(args_.delta + place + m * 16 + half * 8);
    }
  }

  // Keys that no query sees become zero.
  INTERNVL_PTX_FN void load_keys(int64_t tile, int stage) {
    const tile::TileCopy<kHeadDim, kKeys, kThreads> copy(static_cast<int>(threadIdx.x));
    const tile::KeyMask own = mask();
    const int64_t first = tile * kKeys;
    const int head_dim = static_cast<int>(args_.params.head_dim);
    const auto keep = [&](int row) {
      return tile::needs_key(own, static_cast<int32_t>(first) + row);
    };
    copy.load(shared_ + offsetof(Shared, k) + stage * kTileBytes,
              tile::rows_of(args_.params.k, place_.b, head_kv_, first), head_dim, keep);
    copy.load(shared_ + offsetof(Shared, v) + stage * kTileBytes,
              tile::rows_of(args_.params.v, place_.b, head_kv_, first), head_dim, keep);
  }

  INTERNVL_PTX_FN TileClass classify(int64_t tile) const {
    const tile::KeyMask own = mask();
    const tile::QueryTile rows = query_tile<Traits::kBlockM, Traits::kRowParts>(
        args_, own, place_.b, place_.tile * Traits::kRowParts);
    const int64_t j_lo = tile * kKeys, j_hi = smaller(j_lo + kKeys, own.seqlen_k);
    if (args_.row_norms && tile::prune_tiles<Traits::kRowParts, 1>(
                               args_, place_.b, place_.h, place_.tile * Traits::kRowParts, tile,
                               tile_distance(rows.p_lo, rows.p_hi, j_lo, j_hi)))
      return kTileEmpty;
    return tile::classify_padded(own, rows, static_cast<int>(tile), kKeys);
  }

  INTERNVL_PTX_FN void accumulate(int32_t tile, bool partial, int stage) {
    const uint32_t sK = shared_ + offsetof(Shared, k) + stage * kTileBytes;
    const uint32_t sV = shared_ + offsetof(Shared, v) + stage * kTileBytes;
    const uint32_t own = first_row_ * kPitch + Layout::a(lane_);
    INTERNVL_NO_UNROLL  // the addresses of one step at a time: registers are short
        for (int step = 0; step < kKeys / kSplit; step += kStep) {
      const int first = split_ * (kKeys / kSplit) + step;  // of this warp's keys in the tile
      float s[kM][2 * kStepTiles][4] = {}, dp[kM][2 * kStepTiles][4] = {};
      const uint32_t theirs = first * kPitch + Layout::b(lane_);
      multiply_rows<Traits, kM, kStepTiles>(s, shared_ + offsetof(Shared, q) + own, sK + theirs);
      multiply_rows<Traits, kM, kStepTiles>(dp, shared_ + offsetof(Shared, grad) + own,
                                            sV + theirs);
      const int64_t j = int64_t{tile} * kKeys + first;
      if (args_.params.alibi_slopes)
        apply<true>(s, dp, partial, j);
      else
        apply<false>(s, dp, partial, j);
      INTERNVL_UNROLL
      for (int n = 0; n < kStepTiles; ++n) {
        uint32_t ds[kM][4];
        INTERNVL_UNROLL
        for (int m = 0; m < kM; ++m) tile::to_operand<T>(ds[m], dp[m][2 * n], dp[m][2 * n + 1]);
        multiply_columns<Traits, kM, kHeadDim / 8>(
            dq_, ds, sK + (first + n * 16) * kPitch + Layout::a(lane_));
      }
    }
  }

  // dp becomes dS; j is the first key of the step.
  template <bool kAlibi>
  INTERNVL_PTX_FN void apply(float (&s)[kM][2 * kStepTiles][4], float (&dp)[kM][2 * kStepTiles][4],
                             bool partial, int64_t j) {
    const ScoreGrad grad{
        args_.scale_log2,
        kAlibi ? ptx::ld_global_nc(args_.params.alibi_slopes + place_.h) * tile::kLog2e : 0.0f};
    const int64_t row = int64_t{place_.tile} * kRows + first_row_ + lane_ / 4;
    const int64_t column = j + lane_ % 4 * 2;
    float distance = 0.0f;  // of the lane's first row from its first key
    if (kAlibi) {
      const int64_t p = args_.params.query_start
                            ? int64_t{ptx::ld_global_nc(args_.params.query_start + place_.b)}
                            : args_.params.seqlen_k - args_.params.seqlen_q;
      distance = static_cast<float>(p + row - column);
    }
    const auto distance_at = [&](int m, int n, int i) {
      return distance + static_cast<float>(m * 16 + i / 2 * 8 - n * 8 - i % 2);
    };
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
    for (int n = 0; n < 2 * kStepTiles; ++n) INTERNVL_UNROLL
    for (int i = 0; i < 4; ++i)
      grad.template apply<kAlibi>(s[m][n][i], dp[m][n][i], lse_[m][i / 2], delta_[m][i / 2],
                                  distance_at(m, n, i));
    if (partial) apply_mask(dp, row, static_cast<int32_t>(column));
    if constexpr (kAlibi) {
      INTERNVL_UNROLL
      for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
      for (int n = 0; n < 2 * kStepTiles; ++n) INTERNVL_UNROLL
      for (int i = 0; i < 4; ++i)
        slope_sum_ = ptx::fma(dp[m][n][i], fabsf(distance_at(m, n, i)), slope_sum_);
    }
  }

  INTERNVL_PTX_FN void apply_mask(float (&dp)[kM][2 * kStepTiles][4], int64_t row,
                                  int32_t column) const {
    const tile::KeyMask own = mask();
    MaskedQuery queries[kM][2];
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
    for (int half = 0; half < 2; ++half)
      queries[m][half] = masked_query(own, row + m * 16 + half * 8);
    INTERNVL_UNROLL
    for (int n = 0; n < 2 * kStepTiles; ++n) INTERNVL_UNROLL
    for (int e = 0; e < 2; ++e) {
      const MaskedKey key = masked_key(own, column + n * 8 + e);
      INTERNVL_UNROLL
      for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
      for (int half = 0; half < 2; ++half)
        if (!tile::sees(own, queries[m][half], key)) dp[m][n][half * 2 + e] = 0.0f;
    }
  }

  // dQ of the second warp of each pair onto the first one's, through the memory of Q and dO.
  INTERNVL_PTX_FN void add_halves() {
    static_assert(kSplit <= 2, "two halves");
    constexpr int kVectors = kM * kHeadDim / 8;
    const uint32_t at = shared_ + (warp_ / kSplit * kVectors * 32 + lane_) * 16;
    if (split_ == 1) {
      INTERNVL_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        const float (&c)[4] = dq_[n / (kHeadDim / 8)][n % (kHeadDim / 8)];
        ptx::st_shared(at + n * 512, ptx::F32x4{c[0], c[1], c[2], c[3]});
      }
    }
    ptx::sync_threads();
    if (split_ == 0) {
      INTERNVL_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        float (&c)[4] = dq_[n / (kHeadDim / 8)][n % (kHeadDim / 8)];
        const auto other = ptx::ld_shared<ptx::F32x4>(at + n * 512);
        c[0] += other.x, c[1] += other.y, c[2] += other.z, c[3] += other.w;
      }
    }
    ptx::sync_threads();
  }

  INTERNVL_PTX_FN void store() const {
    if (split_ == 0)
      stage_rows<Traits>(dq_, args_.params.softmax_scale, shared_ + offsetof(Shared, q), first_row_,
                         0);
    ptx::sync_threads();
    const int64_t first = int64_t{place_.tile} * kRows;
    store_rows<Traits, kRows, kThreads>(
        shared_ + offsetof(Shared, q), tile::rows_of(args_.grads.dq, place_.b, place_.h, first),
        args_.params.seqlen_q - first, static_cast<int>(args_.params.head_dim), args_.aligned_dq);
  }

  INTERNVL_PTX_FN void store_slope_sum() const {
    float total = slope_sum_;
    INTERNVL_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) total += ptx::shfl_bfly(total, mask);
    const uint32_t sums = shared_ + offsetof(Shared, slope_sums);
    if (lane_ == 0) ptx::st_shared(sums + warp_ * 4, total);
    ptx::sync_threads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kThreads / 32; ++warp)
      total += ptx::ld_shared<float>(sums + warp * 4);
    const int64_t blocks = (args_.params.seqlen_q + kRows - 1) / kRows;
    ptx::st_global(
        args_.slope_sums + (place_.h * args_.params.batch + place_.b) * blocks + place_.tile,
        total);
  }

  const BwdArgs& args_;
  uint32_t shared_;
  int lane_, warp_, split_, first_row_;
  BlockPlace place_;
  int32_t head_kv_;
  float lse_[kM][2], delta_[kM][2];
  float slope_sum_ = 0.0f;
  float dq_[kM][kHeadDim / 8][4] = {};
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kQThreads, Traits::kMinBlocks)
    prefix_attn_bwd_q_kernel(const BwdArgs args) {
  BwdQ<Traits>(args).run();
}

}  // namespace internvl::sm80
