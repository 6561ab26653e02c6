// What a block of a forward knows about itself, kept in shared memory so that the registers are
// free for tiles: its query rows, the mask of its batch row, and the list of key tiles that it
// visits.
#pragma once

#include "common/prune.h"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/mask_tile.cuh"
#include "cuda/tile/reduce.cuh"

namespace internvl::tile {

// What the host decided; passed by value.
struct FwdPlan {
  PrefixAttnParams params;
  KeySummaries summaries;
  const float* key_norms = nullptr;  // [batch][heads_kv][tile_count], null: no distance pruning
  float prune_threshold = 0.0f;
  int tile_count = 0;  // of keys
  int row_tiles = 0;   // of query rows
  int pack = 1;   // query heads whose rows share a tile: row r is row r / pack of head r % pack
  int heads = 0;  // (batch, query head) pairs, or (batch, KV head) pairs when packed
  int heads_per_section = 0;  // their K and V fit the second-level cache together
  bool out_aligned = false;   // 16-byte rows
};

// Where the query rows lie: row r of the tile is query (rest0 + r) / pack after query0, head
// (rest0 + r) % pack after head0.
struct FwdRows {
  int64_t b, head0, head_kv, query0;
  uint32_t rest0, pack;
  int32_t count;  // rows that exist
  int32_t last;   // query of the last of them, after query0

  INTERNVL_PTX_FN int query(int row) const { return static_cast<int>((rest0 + row) / pack); }
  INTERNVL_PTX_FN int head(int row) const { return static_cast<int>((rest0 + row) % pack); }
  INTERNVL_PTX_FN bool exists(int row) const { return row < count; }
  // Of a [batch, seqlen, heads, head_dim] tensor of 16-bit elements, in bytes.
  INTERNVL_PTX_FN int64_t offset(const View& view) const {
    return (b * view.stride_b + query0 * view.stride_s + head0 * view.stride_h) * 2;
  }
  INTERNVL_PTX_FN int64_t offset(const View& view, int row) const {
    return (query(row) * view.stride_s + head(row) * view.stride_h) * 2;
  }
};

struct alignas(16) FwdBlock {
  FwdRows rows;
  KeyMask mask;
  QueryTile query_tile;
  int64_t position0;                  // of query0, not clamped
  int32_t nearest, left, candidates;  // first key tile of the walk; tiles from it leftward; all
  float cutoff_slope;                 // smallest slope of the block; 0: no distance pruning
  float q_norm;                       // longest query row
  int32_t fast;  // full tiles on one side of their queries may take the linear bias
};

// What a query row brings to bias and mask, one load.
struct alignas(16) FwdRow {
  float slope_log2;
  int32_t p;  // clamped position
  int32_t segment;
  int16_t offset;  // of its position from position0
  int16_t inside;  // has a segment
};

// List entries: key tile * 8, plus
constexpr int32_t kNeedsMask = 1;
constexpr int32_t kRightOfQueries = 2;
constexpr int32_t kUnseenKeys = 4;  // perhaps: keys that no query sees, see needs_key

INTERNVL_PTX_FN int32_t entry_tile(int32_t entry) { return entry / 8; }

// Steeper slopes take the exact bias: beside the far keys' linear bias, the near keys' scores would
// lose their last bits.
constexpr float kMaxFastSlope = 16.0f;
constexpr float kMinFastScale = 9.5367432e-7f;  // 2^-20: slope / scale stays moderate

// Shared holds q (chunk c of row r at q_addr() + Traits::q_offset(r, c)), block, rows, list (an
// entry per thread of the team) and words (one per warp). Traits::Team runs the schedule; it has a
// thread per row.
template <class Traits, class Shared>
struct FwdSchedule {
  using Team = typename Traits::Team;
  static constexpr int kBlockN = Traits::kBlockN;
  static_assert(Team::kThreads >= Traits::kBlockM && Team::kThreads >= Traits::kListEntries,
                "thread t describes row t, and judges tile t of a list");

  const FwdPlan& plan;
  const uint32_t shared;
  const int thread, lane;
  uint32_t index = blockIdx.x;  // of the query tile, see find_rows
  uint32_t q_at;
  int taken = 0;  // tiles of the walk that have been looked at
  int listed = 0, next_listed = 0;

  INTERNVL_PTX_FN explicit FwdSchedule(const FwdPlan& launch)
      : plan(launch),
        shared(ptx::dynamic_shared()),
        thread(Team::thread()),
        lane(thread % 32),
        q_at(shared + offsetof(Shared, q)) {}

  INTERNVL_PTX_FN uint32_t q_addr() const { return q_at; }
  INTERNVL_PTX_FN uint32_t words() const { return shared + offsetof(Shared, words); }
  INTERNVL_PTX_FN uint32_t block_addr() const { return shared + offsetof(Shared, block); }
  INTERNVL_PTX_FN int head_dim() const { return static_cast<int>(plan.params.head_dim); }

  INTERNVL_PTX_FN FwdRows rows() const {
    return load_struct<FwdRows>(block_addr() + offsetof(FwdBlock, rows));
  }
  INTERNVL_PTX_FN KeyMask mask() const {
    return load_struct<KeyMask>(block_addr() + offsetof(FwdBlock, mask));
  }
  INTERNVL_PTX_FN int64_t position0() const {
    return ptx::ld_shared<int64_t>(block_addr() + offsetof(FwdBlock, position0));
  }
  INTERNVL_PTX_FN FwdRow row(int tile_row) const {
    return ptx::ld_shared<FwdRow>(shared + offsetof(Shared, rows) + tile_row * sizeof(FwdRow));
  }
  template <class T>
  INTERNVL_PTX_FN T team_min(T x) const {
    return tile::team_min<Team>(x, words());
  }

  // Sections of heads one after the other; within one, the last query tiles (which see most keys)
  // of all its heads first.
  INTERNVL_PTX_FN FwdRows find_rows() const {
    const PrefixAttnParams& params = plan.params;
    const uint32_t per_section = plan.heads_per_section * plan.row_tiles;
    const uint32_t section = index / per_section, place = index % per_section;
    const int first = section * plan.heads_per_section;
    const int left = plan.heads - first;
    const uint32_t heads = left < plan.heads_per_section ? left : plan.heads_per_section;
    const uint32_t head = first + place % heads;
    const uint32_t heads_per_batch = static_cast<uint32_t>(params.heads_q) / plan.pack;
    const uint32_t group =
        static_cast<uint32_t>(params.heads_q) / static_cast<uint32_t>(params.heads_kv);
    const int64_t row0 = int64_t{plan.row_tiles - 1 - place / heads} * Traits::kBlockM;
    const int64_t rest = params.seqlen_q * plan.pack - row0;
    FwdRows rows;
    rows.b = head / heads_per_batch;
    rows.head0 = head % heads_per_batch * plan.pack;
    rows.head_kv = head % heads_per_batch * plan.pack / group;
    rows.query0 = row0 / plan.pack;
    rows.rest0 = static_cast<uint32_t>(row0 % plan.pack);
    rows.pack = plan.pack;
    rows.count = rest < Traits::kBlockM ? static_cast<int>(rest) : Traits::kBlockM;
    rows.last = rows.query(rows.count - 1);
    return rows;
  }

  // Thread t describes row t.
  INTERNVL_PTX_FN void describe_rows(FwdBlock& block) const {
    const FwdRows& rows = block.rows;
    const int own = rows.exists(thread) ? thread : 0;
    const int64_t query = rows.query0 + rows.query(own);
    const QuerySegment segment = query_segment(block.mask, query);
    if (thread < Traits::kBlockM) {
      FwdRow row;
      row.slope_log2 = 0.0f;
      if (const float* slopes = plan.params.alibi_slopes)
        row.slope_log2 = ptx::ld_global_nc(slopes + rows.head0 + rows.head(own)) * kLog2e;
      row.p = clamped_position(block.mask, query);
      row.segment = segment.id;
      row.offset = static_cast<int16_t>(rows.query(own));
      row.inside = segment.inside;
      ptx::st_shared(shared + offsetof(Shared, rows) + thread * sizeof(FwdRow), row);
    }
    QueryTile& tile = block.query_tile;
    tile.p_lo = clamped_position(block.mask, rows.query0);
    tile.p_hi = clamped_position(block.mask, rows.query0 + rows.last);
    if (!block.mask.segments) return;
    tile.any_inside = team_min(segment.inside ? 0 : 1) == 0;
    tile.all_inside = team_min(segment.inside ? 1 : 0) == 1;
    tile.segment_lo = team_min(segment.inside ? segment.id : INT32_MAX);
    tile.segment_hi = ~team_min(segment.inside ? ~segment.id : INT32_MAX);
  }

  INTERNVL_PTX_FN void find_bias(FwdBlock& block) const {
    const PrefixAttnParams& params = plan.params;
    block.fast = params.softmax_scale >= kMinFastScale;
    block.cutoff_slope = 0.0f;
    if (!params.alibi_slopes) return;
    float smallest = INFINITY;
    for (int h = 0; h < plan.pack; ++h) {
      const float slope = ptx::ld_global_nc(params.alibi_slopes + block.rows.head0 + h);
      block.fast = block.fast && fabsf(slope) <= kMaxFastSlope;
      smallest = slope < smallest ? slope : smallest;
    }
    if (plan.key_norms && smallest > 0.0f && smallest < INFINITY) block.cutoff_slope = smallest;
  }

  // |q| of the longest row, from shared memory.
  INTERNVL_PTX_FN float find_q_norm() const {
    float norm = 0.0f;
    if (thread < Traits::kBlockM) {
      float sum = 0.0f;
      for (int chunk = 0; chunk < Traits::kHeadDim / 8; ++chunk)
        sum += chunk_squares<typename Traits::Element>(
            ptx::ld_shared<ptx::U32x4>(q_addr() + Traits::q_offset(thread, chunk)));
      norm = prune_norm(sum);
    }
    return -team_min(norm < INFINITY ? -norm : -INFINITY);
  }

  // Key tiles that some row may see, nearest first.
  INTERNVL_PTX_FN void find_walk(FwdBlock& block) const {
    const KeyMask& mask = block.mask;
    const QueryTile& tile = block.query_tile;
    int32_t begin = 0, end = mask.seqlen_k;
    if (!mask.flags) {
      end = static_cast<int32_t>(visible_key_end(tile.p_hi, mask.prefix_len, mask.end));
      begin = mask.start;
      if (mask.prefix_len <= begin)
        begin = static_cast<int32_t>(larger(begin, causal_key_begin(tile.p_lo, mask.window)));
    }
    block.nearest = block.left = block.candidates = 0;
    if (begin >= end) return;
    const int first = begin / kBlockN, last = (end - 1) / kBlockN;
    const int diagonal = tile.p_hi / kBlockN;
    block.nearest = diagonal < first ? first : diagonal > last ? last : diagonal;
    block.left = block.nearest - first + 1;
    block.candidates = last - first + 1;
  }

  // Fills the description of query tile `index`. load_q(rows) starts copies of Q by this thread.
  template <class LoadQ>
  INTERNVL_PTX_FN FwdRows describe_block(LoadQ load_q) {
    taken = 0;
    FwdBlock block;
    block.rows = find_rows();
    load_q(block.rows);
    block.mask = key_mask(plan.params, plan.summaries, plan.tile_count, block.rows.b);
    block.position0 = query_position(block.mask.first_position, block.rows.query0);
    describe_rows(block);
    find_bias(block);
    find_walk(block);
    block.q_norm = 0.0f;
    if (block.cutoff_slope > 0.0f) {
      ptx::cp_async_wait_group<0>();
      Team::sync();
      block.q_norm = find_q_norm();
    }
    if (thread == 0) store_struct(block_addr(), block);
    Team::sync();
    return block.rows;
  }

  // Step `step` of the walk: -1 to leave the tile out, else its list entry.
  INTERNVL_PTX_FN int32_t judge(const FwdBlock& block, int step, float lower) const {
    const int key_tile =
        step < block.left ? block.nearest - step : block.nearest + 1 + (step - block.left);
    const QueryTile& tile = block.query_tile;
    const TileClass tile_class = classify_padded(block.mask, tile, key_tile, kBlockN);
    if (tile_class == kTileEmpty) return -1;
    const int32_t j_lo = key_tile * kBlockN;
    const int32_t j_hi =
        static_cast<int32_t>(smaller(int64_t{j_lo} + kBlockN, block.mask.seqlen_k));
    if (block.cutoff_slope > 0.0f) {
      const int64_t head = block.rows.b * plan.params.heads_kv + block.rows.head_kv;
      const float norm = ptx::ld_global_nc(plan.key_norms + head * plan.tile_count + key_tile);
      const float cutoff = prune_cutoff(block.cutoff_slope, plan.params.softmax_scale, block.q_norm,
                                        norm, lower, plan.prune_threshold);
      if (prune_tile(cutoff, tile_distance(tile.p_lo, tile.p_hi, j_lo, j_hi))) return -1;
    }
    const bool is_left = j_hi - 1 <= tile.p_lo;
    const bool linear = !plan.params.alibi_slopes || is_left || j_lo >= tile.p_hi;
    const bool full = tile_class == kTileFull;
    return key_tile * 8 + (is_left ? 0 : kRightOfQueries) +
           (full && block.fast && linear ? 0 : kNeedsMask) +
           (full || needs_all_keys(block.mask, j_lo, j_hi) ? 0 : kUnseenKeys);
  }

  // Looks at the next tiles of the walk, one per thread, until some enter the list or none is left.
  // With pruning the first round takes only the nearest ones: they make the bound of the others.
  // lower_bound(rows): at most every row's lse so far, for all threads alike.
  template <class LowerBound>
  INTERNVL_PTX_FN void refill(LowerBound lower_bound) {
    listed = next_listed = 0;
    if (taken == ptx::ld_shared<int32_t>(block_addr() + offsetof(FwdBlock, candidates))) return;
    const FwdBlock block = load_struct<FwdBlock>(block_addr());
    const bool prunes = block.cutoff_slope > 0.0f;
    const float lower = prunes && taken > 0 ? lower_bound(block.rows) : -INFINITY;
    while (listed == 0 && taken < block.candidates) {
      const int wanted =
          prunes && taken == 0 ? Traits::kBlockM / kBlockN + 2 : Traits::kListEntries;
      const int rest = block.candidates - taken;
      const int round = rest < wanted ? rest : wanted;
      const int32_t entry = thread < round ? judge(block, taken + thread, lower) : -1;
      const Place place = team_place<Team>(entry >= 0, words());
      if (entry >= 0) ptx::st_shared(shared + offsetof(Shared, list) + place.index * 4, entry);
      listed = place.count;
      Team::sync();
      taken += round;
    }
  }

  // The next entry, -1 at the end; refill() has run when the list was empty.
  INTERNVL_PTX_FN int32_t next_entry() {
    if (next_listed >= listed) return -1;
    return ptx::ld_shared<int32_t>(shared + offsetof(Shared, list) + next_listed++ * 4);
  }
};

}  // namespace internvl::tile
