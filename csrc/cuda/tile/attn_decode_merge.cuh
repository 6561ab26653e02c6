// How the sums of a decode block, and of the splits of a head, become out and lse.
#pragma once

#include "cuda/tile/attn_decode_schedule.cuh"

namespace internvl::tile {

// Shared holds, beside what FwdSchedule needs, kv (kMaxSplits floats per row fit it once the tiles
// are used up), stats (a pair per row) and arrived (a word).
template <class Traits, class Shared>
struct DecodeMerge : DecodeSchedule<Traits, Shared> {
  using Base = DecodeSchedule<Traits, Shared>;
  using Team = typename Traits::Team;
  using Base::decode, Base::lane, Base::plan, Base::shared, Base::thread;
  static constexpr int kChunks = Traits::kHeadDim / 8;

  INTERNVL_PTX_FN explicit DecodeMerge(const DecodePlan& launch) : Base(launch) {}

  INTERNVL_PTX_FN uint32_t kv_addr() const { return shared + offsetof(Shared, kv); }
  INTERNVL_PTX_FN uint32_t stats_addr(int row) const {
    return shared + offsetof(Shared, stats) + row * sizeof(ptx::F32x2);
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

  // Weight of a sum relative to `own` among sums relative to `reference`.
  INTERNVL_PTX_FN static float weight(float own, float reference) {
    return own == reference ? 1.0f : ptx::ex2(own - reference);  // equal also where both are -inf
  }

  // Eight columns of a finished row; column 0 brings its lse along.
  INTERNVL_PTX_FN void finish(const FwdRows& rows, int row, int chunk, const float (&x)[8],
                              const ptx::F32x2& stats) const {
    const PrefixAttnParams& params = plan.params;
    const bool empty = stats.y == 0.0f;
    const float inverse = empty ? 0.0f : 1.0f / stats.y;
    if (chunk == 0) {
      const int64_t head = rows.b * params.heads_q + rows.head0 + rows.head(row);
      ptx::st_global(params.lse + head * params.seqlen_q + rows.query0 + rows.query(row),
                     empty ? -INFINITY : (stats.x + ptx::lg2(stats.y)) * kLn2);
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
    store_chunk(out + chunk * 16, packed, elements, plan.out_aligned);
  }

  // x += factor * 8 columns.
  INTERNVL_PTX_FN static void add(float (&x)[8], float factor, const ptx::F32x4& left,
                                  const ptx::F32x4& right) {
    const float columns[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
    INTERNVL_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = ptx::fma(factor, columns[e], x[e]);
  }

  // x += 8 columns in shared memory.
  INTERNVL_PTX_FN static void add_shared(float (&x)[8], uint32_t sums) {
    add(x, 1.0f, ptx::ld_shared<ptx::F32x4>(sums), ptx::ld_shared<ptx::F32x4>(sums + 16));
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

  // f(row, chunk) for this thread's share of the rows that exist.
  template <class F>
  INTERNVL_PTX_FN void each_chunk(const FwdRows& rows, F f) const {
    for (int i = thread; i < rows.count * kChunks; i += Team::kThreads) f(i / kChunks, i % kChunks);
  }

  // stats(row): reference and row sum of the block; add_sums(x, row, chunk): x += eight columns of
  // its sums, relative to that reference. Both are in shared memory, behind a barrier.
  template <class Stats, class AddSums>
  INTERNVL_PTX_FN void merge(const FwdRows& rows, Stats stats, AddSums add_sums) const {
    each_chunk(rows, [&](int row, int chunk) {
      float x[8] = {};
      add_sums(x, row, chunk);
      if (decode.splits == 1)
        finish(rows, row, chunk, x, stats(row));
      else
        hand_over(row, chunk, x, stats(row));
    });
    if (decode.splits > 1 && is_last()) merge_splits(rows);
  }

  // Have all other splits of the tile handed over their sums? The ticket orders what was written
  // before it with what is read behind it.
  INTERNVL_PTX_FN bool is_last() const {
    const uint32_t addr = shared + offsetof(Shared, arrived);
    Team::sync();
    if (thread == 0) ptx::st_shared(addr, ptx::atom_add_global(decode.tickets + blockIdx.x, 1));
    Team::sync();
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
    reference = -warp_min(-reference);
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

  INTERNVL_PTX_FN void merge_splits(const FwdRows& rows) const {
    constexpr int kAtOnce = 4;  // splits whose loads are under way together
    for (int row = thread / 32; row < rows.count; row += Team::kWarps) weigh_splits(row);
    Team::sync();
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

}  // namespace internvl::tile
