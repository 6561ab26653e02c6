// How the sums of a decode block's warps, and of the splits of a head, become out and lse.
#pragma once

#include "cuda/sm80/prefix_attn_decode_traits.cuh"
#include "cuda/tile/online_softmax.cuh"

namespace internvl::sm80 {

template <class Traits>
struct DecodeMerge : tile::FwdSchedule<Traits, DecodeShared<Traits>> {
  using Base = tile::FwdSchedule<Traits, DecodeShared<Traits>>;
  using Shared = DecodeShared<Traits>;
  using Base::lane, Base::plan, Base::shared, Base::thread;
  static constexpr int kChunks = Traits::kHeadDim / 8;

  const DecodePlan& decode;
  const int warp_row;  // first query row of this warp

  INTERNVL_PTX_FN explicit DecodeMerge(const DecodePlan& launch)
      : Base(launch.fwd), decode(launch), warp_row(this->thread / 32 % launch.row_warps * 16) {}

  INTERNVL_PTX_FN uint32_t kv_addr() const { return shared + offsetof(Shared, kv); }
  INTERNVL_PTX_FN uint32_t stats_addr(int row) const {
    return shared + offsetof(Shared, stats) + row * sizeof(ptx::F32x2);
  }
  // Row `row` of warp `warp`, by columns.
  INTERNVL_PTX_FN uint32_t sums_addr(int warp, int row, int column) const {
    return kv_addr() + ((warp * 16 + row) * Traits::kPitchFloats + column) * 4;
  }
  INTERNVL_PTX_FN uint32_t factor_addr(int row, int split) const {
    return kv_addr() + (row * kMaxSplits + split) * 4;
  }
  // Of the head's [row][split] and [split][row][column] in memory.
  INTERNVL_PTX_FN ptx::F32x2* stats_of(int row, int split) const {
    return decode.stats + (int64_t{blockIdx.x} * Traits::kBlockM + row) * decode.splits + split;
  }
  INTERNVL_PTX_FN float* sums_of(int row, int split) const {
    const int64_t tile = int64_t{blockIdx.x} * decode.splits + split;
    return decode.sums + (tile * Traits::kBlockM + row) * Traits::kHeadDim;
  }

  // Reference and row sum of the warp's keys for row r of this lane.
  INTERNVL_PTX_FN void put_stats(int r, const ptx::F32x2& stats) const {
    const int row = thread / 32 * 16 + r * 8 + lane / 4;
    if (lane % 4 == 0) ptx::st_shared(stats_addr(row), stats);
  }

  // f(warp) for the warps that hold query row `row`, each with other keys.
  template <class F>
  INTERNVL_PTX_FN void each_holder(int row, F f) const {
    for (int warp = row / 16; warp < Traits::kWarps; warp += decode.row_warps) f(warp);
  }

  // Weight of a sum relative to `own` among sums relative to `reference`.
  INTERNVL_PTX_FN static float weight(float own, float reference) {
    return own == reference ? 1.0f : ptx::ex2(own - reference);  // equal also where both are -inf
  }

  // Of all keys of the block: reference and row sum of query row `row`.
  INTERNVL_PTX_FN ptx::F32x2 warp_stats(int row) const {
    ptx::F32x2 all{-INFINITY, 0.0f};
    const auto stats = [&](int warp) {
      return ptx::ld_shared<ptx::F32x2>(stats_addr(warp * 16 + row % 16));
    };
    each_holder(row, [&](int warp) { all.x = ptx::fmax(all.x, stats(warp).x); });
    each_holder(row, [&](int warp) {
      const ptx::F32x2 part = stats(warp);
      all.y = ptx::fma(part.y, weight(part.x, all.x), all.y);
    });
    return all;
  }

  // Eight columns of a finished row; column 0 brings its lse along.
  INTERNVL_PTX_FN void finish(const tile::FwdRows& rows, int row, int chunk, const float (&x)[8],
                              const ptx::F32x2& stats) const {
    const PrefixAttnParams& params = plan.params;
    const bool empty = stats.y == 0.0f;
    const float inverse = empty ? 0.0f : 1.0f / stats.y;
    if (chunk == 0) {
      const int64_t head = rows.b * params.heads_q + rows.head0 + rows.head(row);
      ptx::st_global(params.lse + head * params.seqlen_q + rows.query0 + rows.query(row),
                     empty ? -INFINITY : (stats.x + ptx::lg2(stats.y)) * tile::kLn2);
    }
    const int elements = this->head_dim() - chunk * 8;
    if (elements <= 0) return;
    using Element = typename Traits::Element;
    const ptx::U32x4 packed{ptx::pack2<Element>(x[0] * inverse, x[1] * inverse),
                            ptx::pack2<Element>(x[2] * inverse, x[3] * inverse),
                            ptx::pack2<Element>(x[4] * inverse, x[5] * inverse),
                            ptx::pack2<Element>(x[6] * inverse, x[7] * inverse)};
    char* out = static_cast<char*>(params.out.data) + rows.offset(params.out) +
                rows.offset(params.out, row);
    tile::store_chunk(out + chunk * 16, packed, elements, plan.out_aligned);
  }

  // x += factor * 8 columns.
  INTERNVL_PTX_FN static void add(float (&x)[8], float factor, const ptx::F32x4& left,
                                  const ptx::F32x4& right) {
    const float columns[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
    INTERNVL_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = ptx::fma(factor, columns[e], x[e]);
  }

  // This block's sums of eight columns, to the splits' memory.
  INTERNVL_PTX_FN void hand_over(int row, int chunk, const float (&x)[8],
                                 const ptx::F32x2& stats) const {
    const int split = static_cast<int>(blockIdx.y);
    if (chunk == 0) ptx::st_global(stats_of(row, split), stats);
    auto* sums = reinterpret_cast<ptx::F32x4*>(sums_of(row, split) + chunk * 8);
    ptx::st_global(sums, ptx::F32x4{x[0], x[1], x[2], x[3]});
    ptx::st_global(sums + 1, ptx::F32x4{x[4], x[5], x[6], x[7]});
  }

  // Warps' sums relative to their rows' common reference, to shared memory. The first barrier also
  // says that nobody needs the tiles any more.
  template <class Softmax, int kDimTiles>
  INTERNVL_PTX_FN void put_sums(const Softmax& softmax, const float (&o)[kDimTiles][4]) const {
    INTERNVL_UNROLL
    for (int r = 0; r < 2; ++r)
      put_stats(r, {softmax.row_max[r], tile::quad_sum(softmax.row_sum[r])});
    ptx::sync_threads();
    INTERNVL_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = r * 8 + lane / 4;
      const float factor = weight(softmax.row_max[r], warp_stats(warp_row + row).x);
      INTERNVL_UNROLL
      for (int d = 0; d < kDimTiles; ++d)
        ptx::st_shared(sums_addr(thread / 32, row, d * 8 + lane % 4 * 2),
                       ptx::F32x2{o[d][r * 2] * factor, o[d][r * 2 + 1] * factor});
    }
    ptx::sync_threads();
  }

  // f(row, chunk) for this thread's share of the rows that exist.
  template <class F>
  INTERNVL_PTX_FN void each_chunk(const tile::FwdRows& rows, F f) const {
    for (int i = thread; i < rows.count * kChunks; i += Traits::kThreads)
      f(i / kChunks, i % kChunks);
  }

  template <class Softmax, int kDimTiles>
  INTERNVL_PTX_FN void merge(const tile::FwdRows& rows, const Softmax& softmax,
                             const float (&o)[kDimTiles][4]) const {
    // A block without key tiles has not waited for Q yet.
    ptx::cp_async_wait_group<0>();
    put_sums(softmax, o);
    each_chunk(rows, [&](int row, int chunk) {
      float x[8] = {};
      each_holder(row, [&](int warp) {
        const uint32_t sums = sums_addr(warp, row % 16, chunk * 8);
        add(x, 1.0f, ptx::ld_shared<ptx::F32x4>(sums), ptx::ld_shared<ptx::F32x4>(sums + 16));
      });
      if (decode.splits == 1)
        finish(rows, row, chunk, x, warp_stats(row));
      else
        hand_over(row, chunk, x, warp_stats(row));
    });
    if (decode.splits > 1 && is_last()) merge_splits(rows);
  }

  // Have all other splits of the tile handed over their sums? The ticket orders what was written
  // before it with what is read behind it.
  INTERNVL_PTX_FN bool is_last() const {
    const uint32_t addr = shared + offsetof(Shared, arrived);
    ptx::sync_threads();
    if (thread == 0) ptx::st_shared(addr, ptx::atom_add_global(decode.tickets + blockIdx.x, 1));
    ptx::sync_threads();
    return ptx::ld_shared<uint32_t>(addr) == static_cast<uint32_t>(decode.splits - 1);
  }

  // Weights of the splits of row `row`, by one warp, and the row's reference and sum.
  INTERNVL_PTX_FN void weigh_splits(int row) const {
    ptx::F32x2 part[kMaxSplits / 32];
    float reference = -INFINITY, sum = 0.0f;
    INTERNVL_UNROLL
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const int split = i * 32 + lane;
      part[i] = split < decode.splits ? ptx::ld_global(stats_of(row, split))
                                      : ptx::F32x2{-INFINITY, 0.0f};
      reference = ptx::fmax(reference, part[i].x);
    }
    reference = -tile::warp_min(-reference);
    INTERNVL_UNROLL
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const float factor = weight(part[i].x, reference);
      sum = ptx::fma(part[i].y, factor, sum);
      if (i * 32 + lane < decode.splits) ptx::st_shared(factor_addr(row, i * 32 + lane), factor);
    }
    INTERNVL_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) sum += ptx::shfl_bfly(sum, lanes);
    if (lane == 0) ptx::st_shared(stats_addr(row), ptx::F32x2{reference, sum});
  }

  INTERNVL_PTX_FN void merge_splits(const tile::FwdRows& rows) const {
    constexpr int kAtOnce = 4;  // splits whose loads are under way together
    for (int row = thread / 32; row < rows.count; row += Traits::kWarps) weigh_splits(row);
    ptx::sync_threads();
    each_chunk(rows, [&](int row, int chunk) {
      float x[8] = {};
      for (int first = 0; first < decode.splits; first += kAtOnce) {
        ptx::F32x4 left[kAtOnce], right[kAtOnce];
        INTERNVL_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= decode.splits) continue;
          const float* sums = sums_of(row, first + i) + chunk * 8;
          left[i] = ptx::ld_global(reinterpret_cast<const ptx::F32x4*>(sums));
          right[i] = ptx::ld_global(reinterpret_cast<const ptx::F32x4*>(sums) + 1);
        }
        INTERNVL_UNROLL
        for (int i = 0; i < kAtOnce; ++i)
          if (first + i < decode.splits)
            add(x, ptx::ld_shared<float>(factor_addr(row, first + i)), left[i], right[i]);
      }
      finish(rows, row, chunk, x, ptx::ld_shared<ptx::F32x2>(stats_addr(row)));
    });
  }
};

}  // namespace internvl::sm80
