// Steps that the two big kernels of the Hopper backward share: the list of tiles to visit, the
// pipeline's slots, copies.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/sm90/prefix_attn_bwd_traits.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/tile/copy.cuh"

namespace internvl::sm90 {

// Named barriers; 0 is sync_threads.
constexpr int kListBarrier = 1;      // consumers and the producing warp
constexpr int kConsumerBarrier = 2;  // consumers
constexpr int kGroupBarrier = 3;     // and the next: one warpgroup

// A stage of the pipeline, and the parity of its barriers in this round.
template <int kStages>
struct Slot {
  int stage = 0;
  uint32_t parity = 0;

  INTERNVL_PTX_FN void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Which of kItems items, from a first one on, a block has to visit. The consumers classify one
// each, so that a skipped tile costs next to nothing; the outcome is two bit sets that the
// producing warp reads.
struct TileList {
  static constexpr int kItems = kConsumerThreads;
  static constexpr int kWords = kItems / 32;
  uint32_t visit[kWords], partial[kWords];
};

constexpr uint32_t kNoMoreTiles = 0xffffffffu;

// By the consumers. The producer has read the list before: it has announced its end.
template <class Classify>
INTERNVL_PTX_FN void fill_list(uint32_t list, int64_t first, int64_t count, Classify classify) {
  const int64_t own = first + threadIdx.x;
  const TileClass tile_class = own < count ? classify(own) : kTileEmpty;
  const uint32_t visit = tile::warp_bits(tile_class != kTileEmpty);
  const uint32_t partial = tile::warp_bits(tile_class == kTilePartial);
  if (threadIdx.x % 32 == 0) {
    const uint32_t word = list + threadIdx.x / 32 * 4;
    ptx::st_shared(word, visit);
    ptx::st_shared(word + TileList::kWords * 4, partial);
  }
  ptx::bar_sync(kListBarrier, kConsumerThreads + 32);
}

// By the producing warp: send(item, partial) for each tile of the list.
template <class Send>
INTERNVL_PTX_FN void walk_list(uint32_t list, int32_t first, Send send) {
  ptx::bar_sync(kListBarrier, kConsumerThreads + 32);
  INTERNVL_NO_UNROLL
  for (int word = 0; word < TileList::kWords; ++word) {
    uint32_t visit = ptx::ld_shared<uint32_t>(list + 4 * word);
    const uint32_t partial = ptx::ld_shared<uint32_t>(list + 4 * (TileList::kWords + word));
    INTERNVL_NO_UNROLL
    for (; visit != 0; visit &= visit - 1) {
      const int bit = tile::lowest_bit(visit);
      send(first + word * 32 + bit, (partial >> bit & 1) != 0);
    }
  }
}

// Rows from `row` on of (head, batch row) to a tile in shared memory; by one thread.
template <class Tile>
INTERNVL_PTX_FN void load_tile(uint32_t tile, const ptx::TensorMap* map, int row, int head, int b,
                               uint32_t barrier) {
  INTERNVL_UNROLL
  for (int panel = 0; panel < Tile::kPanels; ++panel) INTERNVL_UNROLL
  for (int box = 0; box < Tile::kRows / kBoxRows; ++box)
    ptx::tma_load_4d(tile + panel * Tile::kPanelBytes + box * kBoxRows * Tile::kRowBytes, map,
                     panel * Tile::kPanel, row + box * kBoxRows, head, b, barrier);
}

// Zeros into the rows for which clear(row) holds; by one warp, which has waited for the tile.
template <class Tile, class Clear>
INTERNVL_PTX_FN void clear_rows(uint32_t tile, Clear clear) {
  constexpr int kChunks = Tile::kColumns / 8;
  INTERNVL_NO_UNROLL  // seldom
      for (int n = static_cast<int>(threadIdx.x) % 32; n < Tile::kRows * kChunks;
           n += 32) if (clear(n / kChunks))
          ptx::st_shared(tile + Tile::offset(n / kChunks, n % kChunks * 8), ptx::U32x4{0, 0, 0, 0});
}

// Zeros where bit i of `hidden` is set.
template <int kCount, int kWords>
INTERNVL_PTX_FN void clear_hidden(float (&x)[kCount], const uint32_t (&hidden)[kWords]) {
  static_assert(kCount == 32 * kWords, "a bit each");
  INTERNVL_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (hidden[i / 32] >> (i % 32) & 1) x[i] = 0.0f;
}

// A warpgroup's accumulators [64, Tile::kColumns], times `factor`, to rows `row` and on of the tile
// in shared memory and from there, in whole runs of a row, to the first `rows` of `to`.
template <class T, class Tile>
INTERNVL_PTX_FN void store_rows(const float (&c)[Tile::kColumns / 2], float factor, uint32_t tile,
                                int row, const tile::Rows& to, int64_t rows, int head_dim,
                                bool aligned) {
  constexpr int kChunks = Tile::kColumns / 8;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const int lane = thread % 32, warp_row = row + thread / 32 * 16 + lane / 4;
  INTERNVL_UNROLL
  for (int n = 0; n < kChunks; ++n) INTERNVL_UNROLL
  for (int half = 0; half < 2; ++half)
    ptx::st_shared(tile + Tile::offset(warp_row + half * 8, n * 8) + lane % 4 * 4,
                   ptx::pack2<T>(c[4 * n + 2 * half] * factor, c[4 * n + 2 * half + 1] * factor));
  ptx::bar_sync(kGroupBarrier + static_cast<int>(threadIdx.x) / kWarpgroupThreads,
                kWarpgroupThreads);
  INTERNVL_NO_UNROLL
  for (int n = thread; n < 64 * kChunks; n += kWarpgroupThreads) {
    const int at = row + n / kChunks, column = n % kChunks * 8;
    if (at >= rows || column >= head_dim) continue;
    tile::store_chunk(const_cast<char*>(to.data) + at * to.stride_bytes + column * 2,
                      ptx::ld_shared<ptx::U32x4>(tile + Tile::offset(at, column)),
                      static_cast<int>(smaller(8, head_dim - column)), aligned);
  }
}

}  // namespace internvl::sm90
