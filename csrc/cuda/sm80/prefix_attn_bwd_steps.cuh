// Steps that the two big kernels of the backward share: the list of tiles to visit, and products of
// swizzled tiles.
#pragma once

#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/sm80/prefix_attn_bwd_traits.cuh"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/online_softmax.cuh"

namespace internvl::sm80 {

// Walks over the items 0 to count - 1 whose class is not empty. The threads classify kThreads items
// at once, one each, so that a skipped tile costs next to nothing; the outcome is two bit sets in
// shared memory. All threads of the block make the same calls.
template <int kThreads>
class TileList {
 public:
  static constexpr int kWords = kThreads / 32;
  struct Shared {
    uint32_t visit[kWords], partial[kWords];
  };

  INTERNVL_PTX_FN TileList(uint32_t shared, int64_t count)
      : shared_(shared), count_(static_cast<int32_t>(count)) {}

  // The next item, or false when there is none. classify(item) gives its class.
  template <class Classify>
  INTERNVL_PTX_FN bool next(Classify classify) {
    while (visit_ == 0) {
      if (++word_ >= kWords) {
        if (base_ >= count_ - kThreads) return false;  // no sum beyond 31 bits
        base_ += kThreads;
        fill(classify);
        word_ = 0;
      }
      visit_ = ptx::ld_shared<uint32_t>(shared_ + 4 * word_);
      partial_ = ptx::ld_shared<uint32_t>(shared_ + 4 * (kWords + word_));
    }
    const int bit = lowest_bit(visit_);
    visit_ &= visit_ - 1;
    item = base_ + word_ * 32 + bit;
    partial = partial_ >> bit & 1;
    return true;
  }

  int32_t item = 0;
  bool partial = false;

 private:
  template <class Classify>
  INTERNVL_PTX_FN void fill(Classify classify) {
    const int64_t own = int64_t{base_} + threadIdx.x;
    const TileClass tile_class = own < count_ ? classify(own) : kTileEmpty;
    const uint32_t visit = warp_bits(tile_class != kTileEmpty);
    const uint32_t partial_bits = warp_bits(tile_class == kTilePartial);
    ptx::sync_threads();  // everybody has read the sets before
    if (threadIdx.x % 32 == 0) {
      ptx::st_shared(shared_ + threadIdx.x / 32 * 4, visit);
      ptx::st_shared(shared_ + (kWords + threadIdx.x / 32) * 4, partial_bits);
    }
    ptx::sync_threads();
  }

  uint32_t shared_;
  int32_t count_, base_ = -kThreads;
  int word_ = kWords;
  uint32_t visit_ = 0, partial_ = 0;
};

// c [16 kM, 16 kN] += A B^T over kHeadDim columns, A and B row-major in shared memory; `a` and `b`
// are the lane's addresses (Swizzle::a, Swizzle::b) at their first rows.
template <class Traits, int kM, int kN>
INTERNVL_PTX_FN void multiply_rows(float (&c)[kM][2 * kN][4], uint32_t a, uint32_t b) {
  using Layout = typename Traits::Layout;
  using T = typename Traits::Element;
  INTERNVL_UNROLL
  for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
    uint32_t rA[kM][4];
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m)
      ptx::ldmatrix_x4(rA[m], Layout::right(a + m * 16 * Layout::kPitchBytes, 2 * k));
    INTERNVL_UNROLL
    for (int n = 0; n < kN; ++n) {
      uint32_t rB[4];
      ptx::ldmatrix_x4(rB, Layout::right(b + n * 16 * Layout::kPitchBytes, 2 * k));
      const uint32_t left[2] = {rB[0], rB[1]}, right[2] = {rB[2], rB[3]};
      INTERNVL_UNROLL
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<T>(c[m][2 * n], rA[m], left, c[m][2 * n]);
        ptx::mma_m16n8k16<T>(c[m][2 * n + 1], rA[m], right, c[m][2 * n + 1]);
      }
    }
  }
}

// c [16 kM, 8 kN8] += A B: A [16 kM, 16] fragments, B [16, 8 kN8] row-major in shared memory with k
// along its rows; `b` is the lane's address (Swizzle::a) at its first row and column.
template <class Traits, int kM, int kN8>
INTERNVL_PTX_FN void multiply_columns(float (&c)[kM][kN8][4], const uint32_t (&a)[kM][4],
                                      uint32_t b) {
  using Layout = typename Traits::Layout;
  using T = typename Traits::Element;
  INTERNVL_UNROLL
  for (int n = 0; n < kN8 / 2; ++n) {
    uint32_t rB[4];
    ptx::ldmatrix_x4_trans(rB, Layout::right(b, 2 * n));
    const uint32_t left[2] = {rB[0], rB[1]}, right[2] = {rB[2], rB[3]};
    INTERNVL_UNROLL
    for (int m = 0; m < kM; ++m) {
      ptx::mma_m16n8k16<T>(c[m][2 * n], a[m], left, c[m][2 * n]);
      ptx::mma_m16n8k16<T>(c[m][2 * n + 1], a[m], right, c[m][2 * n + 1]);
    }
  }
}

// Accumulators [16 kM, 8 kN8] of a warp, times `factor`, into the tile at `tile` as 16-bit
// elements: rows from `row`, 8-element chunks from `chunk`.
template <class Traits, int kM, int kN8>
INTERNVL_PTX_FN void stage_rows(const float (&c)[kM][kN8][4], float factor, uint32_t tile, int row,
                                int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  INTERNVL_UNROLL
  for (int m = 0; m < kM; ++m) INTERNVL_UNROLL
  for (int half = 0; half < 2; ++half) INTERNVL_UNROLL
  for (int n = 0; n < kN8; ++n)
    ptx::st_shared(
        tile + Traits::Layout::offset(row + m * 16 + half * 8 + lane / 4, chunk + n) + lane % 4 * 4,
        ptx::pack2<typename Traits::Element>(c[m][n][2 * half] * factor,
                                             c[m][n][2 * half + 1] * factor));
}

// The first `rows` rows of a tile in shared memory to global memory, in whole runs of a row.
template <class Traits, int kRows, int kThreads>
INTERNVL_PTX_FN void store_rows(uint32_t tile, const tile::Rows& to, int64_t rows, int head_dim,
                                bool aligned) {
  constexpr int kChunks = Traits::Layout::kChunks;
  for (int n = static_cast<int>(threadIdx.x); n < kRows * kChunks; n += kThreads) {
    const int row = n / kChunks, chunk = n % kChunks;
    if (row >= rows || chunk * 8 >= head_dim) continue;
    const auto value = ptx::ld_shared<ptx::U32x4>(tile + Traits::Layout::offset(row, chunk));
    tile::store_chunk(const_cast<char*>(to.data) + row * to.stride_bytes + chunk * 16, value,
                      static_cast<int>(smaller(8, head_dim - chunk * 8)), aligned);
  }
}

}  // namespace internvl::sm80
