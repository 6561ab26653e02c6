// The consumer of the sm90 decode kernel: a warpgroup that multiplies, everything transposed.
#pragma once

#include "cuda/sm90/prefix_attn_decode_traits.cuh"
#include "cuda/tile/attn_decode_merge.cuh"
#include "cuda/tile/online_softmax.cuh"

namespace internvl::sm90 {

template <class Traits>
struct DecodeConsumer : tile::DecodeMerge<Traits, DecodeShared<Traits>> {
  using Base = tile::DecodeMerge<Traits, DecodeShared<Traits>>;
  using Element = typename Traits::Element;
  using Shared = DecodeShared<Traits>;
  using Team = typename Traits::Team;
  using QTile = typename Traits::QTile;
  using KvTile = typename Traits::KvTile;
  using WeightTile = typename Traits::WeightTile;
  using Base::entry, Base::lane, Base::listed, Base::mask, Base::plan, Base::q_addr, Base::shared,
      Base::thread;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kScores = kBlockM / 2;  // of a lane, and of its sums for 64 columns
  static constexpr int kRows = kBlockM / 4;    // query rows of a lane: see tile_row
  static constexpr int kKeys = 2;              // its keys of a tile: lane_key, and the 8th behind
  static constexpr float kSlack = tile::OnlineSoftmax<1>::kSlack;

  Stage<Traits::kSlots> slot;

  float s[kScores];                      // [keys, rows]: row r, key h at score(r, h)
  float o[Traits::kDimBlocks][kScores];  // [columns, rows], likewise
  float row_sum[kRows];                  // of this lane's keys

  INTERNVL_PTX_FN explicit DecodeConsumer(const DecodePlan& launch) : Base(launch) {}

  // Row of the tile that row r of this lane is; row 2i + 1 follows row 2i.
  INTERNVL_PTX_FN int tile_row(int r) const { return r / 2 * 8 + lane % 4 * 2 + r % 2; }
  // Where an array keeps it, with what r brings as a constant.
  INTERNVL_PTX_FN uint32_t row_addr(size_t array, int r, int bytes) const {
    const uint32_t first = static_cast<uint32_t>(thread) % 4 * 2 * bytes;
    return shared + static_cast<uint32_t>(array) + first + (r / 2 * 8 + r % 2) * bytes;
  }
  INTERNVL_PTX_FN static int score(int r, int h) { return r / 2 * 4 + h * 2 + r % 2; }
  INTERNVL_PTX_FN int key_in_tile() const {
    const uint32_t known = static_cast<uint32_t>(thread) % kWarpgroup;  // to be below 64
    return static_cast<int>(known / 32 * 16 + known % 32 / 4);
  }
  INTERNVL_PTX_FN int32_t lane_key(int32_t entry) const {
    return tile::entry_tile(entry) * Traits::kBlockN + key_in_tile();
  }

  // References of the exponents, base 2, of rows r and r + 1 of this lane.
  INTERNVL_PTX_FN uint32_t references_addr(int r) const {
    return row_addr(offsetof(Shared, references), r, 4);
  }
  INTERNVL_PTX_FN ptx::F32x2 references(int r) const {
    return ptx::ld_shared<ptx::F32x2>(references_addr(r));
  }
  INTERNVL_PTX_FN tile::FwdRow own_row(int r) const {
    return ptx::ld_shared<tile::FwdRow>(row_addr(offsetof(Shared, rows), r, sizeof(tile::FwdRow)));
  }

  // The lane's best score of row r.
  INTERNVL_PTX_FN float largest(int r) const { return ptx::fmax(s[score(r, 0)], s[score(r, 1)]); }

  // --- handing over ---

  // Tells the producer that the list has `entries`, of K alone when negative.
  INTERNVL_PTX_FN void publish_list(int entries) const {
    if (thread != 0) return;
    ptx::st_shared(shared + offsetof(Shared, listed), entries);
    ptx::mbarrier_arrive(shared + offsetof(Shared, list_full));
  }

  INTERNVL_PTX_FN uint32_t wait_for_slot() const {
    ptx::mbarrier_wait_parity(shared + offsetof(Shared, full) + 8 * slot.index, slot.parity);
    return this->kv_addr() + slot.index * KvTile::kBytes;
  }
  INTERNVL_PTX_FN void release_slot() {
    if (thread == 0) ptx::mbarrier_arrive(shared + offsetof(Shared, empty) + 8 * slot.index);
    slot.advance();
  }

  // --- products ---

  // S^T = K Q^T. (The zeros are for the compiler, which would keep the old values.)
  INTERNVL_PTX_FN void qk_gemm(uint32_t k) {
    INTERNVL_UNROLL
    for (int i = 0; i < kScores; ++i) s[i] = 0.0f;
    fence_operands(s);
    ptx::wgmma_fence();
    INTERNVL_UNROLL
    for (int d = 0; d < Traits::kHeadDim; d += tile::kSliceK)
      ptx::wgmma_ss<Element, kBlockM, ptx::Major::kK, ptx::Major::kK>(
          s, KvTile::k_major(k, 0, d), QTile::k_major(q_addr(), 0, d), d > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    fence_operands(s);
  }

  // O^T += V^T P^T of the next slot.
  INTERNVL_PTX_FN void pv_gemm(uint32_t weights) {
    const uint32_t v = wait_for_slot();
    INTERNVL_UNROLL
    for (int block = 0; block < Traits::kDimBlocks; ++block) fence_operands(o[block]);
    ptx::wgmma_fence();
    INTERNVL_UNROLL
    for (int n = 0; n < Traits::kBlockN; n += tile::kSliceK) {
      INTERNVL_UNROLL
      for (int block = 0; block < Traits::kDimBlocks; ++block)
        ptx::wgmma_ss<Element, kBlockM, ptx::Major::kMN, ptx::Major::kK>(
            o[block], KvTile::mn_major(v, n, 64 * block), WeightTile::k_major(weights, 0, n), true);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    INTERNVL_UNROLL
    for (int block = 0; block < Traits::kDimBlocks; ++block) fence_operands(o[block]);
    release_slot();
  }

  // --- scores ---

  // Bit score(r, h): does row r see key h?
  INTERNVL_PTX_FN uint32_t see_keys(int32_t entry) const {
    if (!(entry & tile::kNeedsMask)) return ~0u;
    const tile::KeyMask keys = mask();
    tile::Key key[kKeys];
    int32_t segment[kKeys];
    INTERNVL_UNROLL
    for (int h = 0; h < kKeys; ++h) {
      const int32_t j = lane_key(entry) + 8 * h;
      key[h] = tile::key_at(keys, j);
      segment[h] = keys.segments ? tile::key_segment(keys, j) : 0;
    }
    uint32_t seen = 0;
    INTERNVL_NO_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const tile::FwdRow row = own_row(r);
      INTERNVL_UNROLL
      for (int h = 0; h < kKeys; ++h) {
        const bool same = !keys.segments || (row.inside && row.segment == segment[h]);
        seen |= uint32_t{same && tile::sees(keys, row.p, key[h])} << score(r, h);
      }
    }
    return seen;
  }

  // Scores with bias and mask, in base 2, in place of the products.
  template <bool kMasked>
  INTERNVL_PTX_FN void bias(int32_t entry, uint32_t seen) {
    const float distance = static_cast<float>(this->position0() - lane_key(entry));
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const tile::FwdRow row = own_row(r);
      const float away = distance + static_cast<float>(row.offset);
      INTERNVL_UNROLL
      for (int h = 0; h < kKeys; ++h) {
        float& x = s[score(r, h)];
        x = ptx::fma(x, scale_log2(), -row.slope_log2 * fabsf(away - static_cast<float>(8 * h)));
        if (kMasked) x = seen >> score(r, h) & 1 ? x : -INFINITY;
      }
    }
  }
  INTERNVL_PTX_FN void mask_and_bias(int32_t entry, uint32_t seen) {
    if (entry & tile::kNeedsMask) {
      bias<true>(entry, seen);
    } else if (plan.params.alibi_slopes) {
      bias<false>(entry, seen);
    } else {
      INTERNVL_UNROLL
      for (int i = 0; i < kScores; ++i) s[i] *= scale_log2();
    }
  }
  INTERNVL_PTX_FN float scale_log2() const { return plan.params.softmax_scale * tile::kLog2e; }

  // Of the warp's 16 keys: f of both and of all lanes with the same rows.
  template <class F>
  INTERNVL_PTX_FN static float over_keys(float x, F f) {
    INTERNVL_UNROLL
    for (int lanes = 4; lanes < 32; lanes *= 2) x = f(x, ptx::shfl_bfly(x, lanes));
    return x;
  }

  // Where warp `warp` says which scores are the best of rows r and r + 1 of this lane.
  INTERNVL_PTX_FN uint32_t best_addr(int warp, int r) const {
    return row_addr(offsetof(Shared, stats) + warp * kBlockM * 4, r, 4);
  }

  // best(r): of this lane.
  template <class Best>
  INTERNVL_PTX_FN void put_best(Best best) const {
    const auto larger = [](float a, float b) { return ptx::fmax(a, b); };
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; r += 2) {
      const ptx::F32x2 pair{over_keys(best(r), larger), over_keys(best(r + 1), larger)};
      if (lane < 4) ptx::st_shared(best_addr(thread / 32, r), pair);
    }
  }

  INTERNVL_PTX_FN uint32_t weights_addr(int buffer) const {
    return shared + offsetof(Shared, weights) + buffer * WeightTile::kBytes;
  }

  // Scores become weights, in place and in shared memory. Has one outgrown its reference? Rows that
  // have met no visible key have scores of -inf only; any finite reference makes them 0.
  INTERNVL_PTX_FN bool put_weights(uint32_t weights) {
    uint32_t addr[2][kKeys];
    INTERNVL_UNROLL
    for (int i = 0; i < 2; ++i) {
      INTERNVL_UNROLL
      for (int h = 0; h < kKeys; ++h)
        addr[i][h] = weights + WeightTile::offset(tile_row(i), key_in_tile() + 8 * h);
    }
    bool outgrown = false;
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; r += 2) {
      const ptx::F32x2 pair = references(r);
      INTERNVL_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float reference = i == 0 ? pair.x : pair.y;
        outgrown |= largest(r + i) > reference + kSlack;
        const float from = reference == -INFINITY ? 0.0f : reference;
        float &left = s[score(r + i, 0)], &right = s[score(r + i, 1)];
        left = ptx::ex2(left - from);
        right = ptx::ex2(right - from);
        const uint32_t both = ptx::pack2<Element>(left, right);
        const uint32_t group = r / 2 * WeightTile::kGroupBytes;
        ptx::st_shared(addr[i][0] + group, static_cast<uint16_t>(both));
        ptx::st_shared(addr[i][1] + group, static_cast<uint16_t>(both >> 16));
      }
    }
    ptx::fence_proxy_async_shared();
    return outgrown;
  }

  // The references of rows r and r + 1, or what has outgrown them.
  INTERNVL_PTX_FN ptx::F32x2 next_references(int r) const {
    ptx::F32x2 best = references(r);
    INTERNVL_UNROLL
    for (int warp = 0; warp < Team::kWarps; ++warp) {
      const ptx::F32x2 other = ptx::ld_shared<ptx::F32x2>(best_addr(warp, r));
      best = {ptx::fmax(best.x, other.x), ptx::fmax(best.y, other.y)};
    }
    return best;
  }

  // References become the rows' best scores, and the sums so far follow.
  INTERNVL_PTX_FN void move_references() {
    put_best([&](int r) { return largest(r); });
    Team::sync();
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; r += 2) {
      const ptx::F32x2 old = references(r), next = next_references(r);
      scale_sums(r, Base::weight(old.x, next.x));
      scale_sums(r + 1, Base::weight(old.y, next.y));
    }
    Team::sync();
    if (thread < 4) {
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; r += 2) ptx::st_shared(references_addr(r), next_references(r));
    }
    Team::sync();
  }

  INTERNVL_PTX_FN void scale_sums(int r, float factor) {
    row_sum[r] *= factor;
    INTERNVL_UNROLL
    for (int block = 0; block < Traits::kDimBlocks; ++block) {
      INTERNVL_UNROLL
      for (int h = 0; h < kKeys; ++h) o[block][score(r, h)] *= factor;
    }
  }

  // Weights of the next slot's keys. Most tiles meet in one barrier: weights relative to the
  // references so far are good enough unless some warp says that a score has outgrown its own.
  // Else, and in the first tile, once more from the product on: nobody keeps the scores.
  INTERNVL_PTX_FN void weigh(int32_t entry, int buffer) {
    const uint32_t seen = see_keys(entry);
    const uint32_t k = wait_for_slot();
    const uint32_t above = shared + offsetof(Shared, above) + buffer * sizeof(Shared::above[0]);
    for (bool moves = false;; moves = true) {
      qk_gemm(k);
      mask_and_bias(entry, seen);
      if (moves) move_references();
      const uint32_t any = ptx::vote_any(put_weights(weights_addr(buffer)));
      if (lane == 0) ptx::st_shared(above + thread / 32 * 4, any);
      Team::sync();
      const ptx::U32x4 warps = ptx::ld_shared<ptx::U32x4>(above);
      if ((warps.x | warps.y | warps.z | warps.w) == 0) break;  // always, once they have moved
    }
    release_slot();
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) row_sum[r] += s[score(r, 0)] + s[score(r, 1)];
  }

  // --- the walk ---

  // A lower bound of every row's lse in natural units, the same in every split: the best scores of
  // the nearest key tiles. -inf where some row sees none of them, or nothing is to be pruned.
  INTERNVL_PTX_FN float lower_bound(const tile::FwdBlock& block) {
    const int tiles = this->bound_tiles(block);
    if (tiles == 0) return -INFINITY;
    if (thread < tiles) this->put_entry(thread, this->bound_entry(block, thread));
    Team::sync();
    publish_list(-tiles);
    wait_for_q_rows<Traits>();
    float best[kRows];
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) best[r] = -INFINITY;
    for (int i = 0; i < tiles; ++i) {
      const int32_t nearest = entry(i);
      const uint32_t seen = see_keys(nearest);
      qk_gemm(wait_for_slot());
      release_slot();
      mask_and_bias(nearest, seen);
      INTERNVL_UNROLL
      for (int r = 0; r < kRows; ++r) best[r] = ptx::fmax(best[r], largest(r));
    }
    put_best([&](int r) { return best[r]; });
    Team::sync();
    float score = INFINITY;
    if (thread < block.rows.count) {
      score = -INFINITY;
      for (int warp = 0; warp < Team::kWarps; ++warp)
        score = ptx::fmax(score, ptx::ld_shared<float>(shared + offsetof(Shared, stats) +
                                                       (warp * kBlockM + thread) * 4));
    }
    return this->team_min(score * tile::kLn2);
  }

  // --- epilogue ---

  INTERNVL_PTX_FN uint32_t sums_addr(int row, int column) const {
    return this->kv_addr() + (row * Traits::kPitchFloats + column) * 4;
  }

  // What merge() wants, to shared memory: the products with the tiles there are done.
  INTERNVL_PTX_FN void put_sums() const {
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; r += 2) {
      const ptx::F32x2 pair = references(r);
      INTERNVL_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float sum = over_keys(row_sum[r + i], [](float a, float b) { return a + b; });
        if (lane < 4)
          ptx::st_shared(this->stats_addr(thread / 32 * kBlockM + tile_row(r + i)),
                         ptx::F32x2{i == 0 ? pair.x : pair.y, sum});
      }
    }
    INTERNVL_UNROLL
    for (int block = 0; block < Traits::kDimBlocks; ++block) {
      INTERNVL_UNROLL
      for (int h = 0; h < kKeys; ++h) {
        const int column = 64 * block + key_in_tile() + 8 * h;
        if (column >= Traits::kHeadDim) continue;
        INTERNVL_UNROLL
        for (int r = 0; r < kRows; ++r)
          ptx::st_shared(sums_addr(tile_row(r), column), o[block][score(r, h)]);
      }
    }
    Team::sync();
  }

  // Reference and row sum of query row `row`: the warps share references.
  INTERNVL_PTX_FN ptx::F32x2 block_stats(int row) const {
    ptx::F32x2 all = ptx::ld_shared<ptx::F32x2>(this->stats_addr(row));
    INTERNVL_UNROLL
    for (int warp = 1; warp < Team::kWarps; ++warp)
      all.y += ptx::ld_shared<ptx::F32x2>(this->stats_addr(warp * kBlockM + row)).y;
    return all;
  }

  INTERNVL_PTX_FN void clear_sums() {
    INTERNVL_UNROLL
    for (int r = 0; r < kRows; ++r) row_sum[r] = 0.0f;
    INTERNVL_UNROLL
    for (int block = 0; block < Traits::kDimBlocks; ++block) {
      INTERNVL_UNROLL
      for (int i = 0; i < kScores; ++i) o[block][i] = 0.0f;
    }
  }

  INTERNVL_PTX_FN void run() {
    if (thread < kBlockM)
      ptx::st_shared(shared + offsetof(Shared, references) + thread * 4, -INFINITY);
    this->describe_block([&](const tile::FwdRows& rows) {
      load_q_rows<Traits>(q_addr(), plan.params.q, rows, this->head_dim());
    });
    this->take_share();
    const float lower = lower_bound(this->block());
    this->next_list(lower);
    publish_list(listed);
    wait_for_q_rows<Traits>();
    clear_sums();
    while (listed > 0) {
      for (int i = 0; i < listed; ++i) {
        const int buffer = i % 2;  // between lists all meet
        weigh(entry(i), buffer);
        pv_gemm(weights_addr(buffer));
      }
      this->next_list(lower);
      publish_list(listed);
    }
    put_sums();
    this->merge(
        this->rows(), [&](int row) { return block_stats(row); },
        [&](float (&x)[8], int row, int chunk) { Base::add_shared(x, sums_addr(row, chunk * 8)); });
  }
};

}  // namespace internvl::sm90
