// Copies of [rows, kHeadDim] tiles of 16-bit elements between global memory and swizzled shared
// memory, 16 bytes at a time. Rows in global memory start at 16-byte addresses (pack_rows.cuh makes
// such a copy of tensors that do not), and may hold fewer elements than kHeadDim: the rest becomes
// zero, as do rows that the caller does not keep.
#pragma once

#include "common/params.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/tile/swizzle.cuh"

namespace internvl::tile {

// Rows of one head: row r starts at data + r * stride_bytes.
struct Rows {
  const char* data;
  int64_t stride_bytes;
};

INTERNVL_PTX_FN Rows rows_of(const View& view, int64_t b, int64_t h, int64_t first_row = 0) {
  const int64_t offset = b * view.stride_b + h * view.stride_h + first_row * view.stride_s;
  return {static_cast<const char*>(view.data) + offset * 2, view.stride_s * 2};
}

// How kThreads threads share a tile: kGroup neighbouring threads read one stretch of a row, so that
// each thread stays in its chunk column and its swizzle is the same for all its rows.
template <int kHeadDim, int kRows, int kThreads>
struct TileCopy {
  using Layout = Swizzle<kHeadDim>;
  static constexpr int kRowsPerPass = kThreads / Layout::kGroup;
  static constexpr int kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kColumns = Layout::kChunks / Layout::kGroup;  // chunks of a thread per row
  static_assert(kRowsPerPass % 8 == 0, "the swizzle repeats every 8 rows");
  static_assert(kRows % kRowsPerPass == 0 || kRows < kRowsPerPass,
                "a pass holds whole rows of the tile");

  int row, chunk;  // of this thread in the first pass
  uint32_t dst;    // byte offset inside the tile

  INTERNVL_PTX_FN explicit TileCopy(int thread)
      : row(thread / Layout::kGroup),
        chunk(thread % Layout::kGroup),
        dst(Layout::offset(row, chunk)) {}

  // Bytes of column c that exist in a row of head_dim elements.
  INTERNVL_PTX_FN int bytes(int c, int head_dim) const {
    const int rest = (head_dim - (chunk + c * Layout::kGroup) * 8) * 2;
    return rest < 0 ? 0 : rest > 16 ? 16 : rest;
  }

  // Starts the asynchronous copy of the rows for which keep(row) holds; zeros elsewhere. The caller
  // commits the group.
  template <class Keep>
  INTERNVL_PTX_FN void load(uint32_t tile, const Rows& src, int head_dim, Keep keep) const {
    const char* from = src.data + row * src.stride_bytes + chunk * 16;
    uint32_t kept_passes = 0;
    INTERNVL_NO_UNROLL
    for (int pass = 0; pass < kPasses; ++pass)
      kept_passes |= uint32_t{keep(row + pass * kRowsPerPass)} << pass;
    INTERNVL_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      if (kRows < kRowsPerPass && row >= kRows) break;
      const bool kept = kept_passes >> pass & 1;
      INTERNVL_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int count = kept ? bytes(c, head_dim) : 0;
        ptx::cp_async_cg_16(
            tile + dst + pass * kRowsPerPass * Layout::kPitchBytes + c * Layout::kGroup * 16,
            from + c * Layout::kGroup * 16, count);  // reads nothing where count is 0
      }
      from += kRowsPerPass * src.stride_bytes;
    }
  }

  // The same where every row is kept.
  INTERNVL_PTX_FN void load_all(uint32_t tile, const Rows& src, int head_dim) const {
    const char* from = src.data + row * src.stride_bytes + chunk * 16;
    load_rows(
        tile, head_dim, [&](int at) { return from + (at - row) * src.stride_bytes - chunk * 16; },
        src.data);
  }

  // The same for rows that lie anywhere: at(row) is the row's address, null for zeros.
  template <class At>
  INTERNVL_PTX_FN void load_rows(uint32_t tile, int head_dim, At at, const char* valid) const {
    INTERNVL_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      if (kRows < kRowsPerPass && row >= kRows) break;
      const char* from = at(row + pass * kRowsPerPass);
      INTERNVL_UNROLL
      for (int c = 0; c < kColumns; ++c)
        ptx::cp_async_cg_16(
            tile + dst + pass * kRowsPerPass * Layout::kPitchBytes + c * Layout::kGroup * 16,
            from ? from + (chunk + c * Layout::kGroup) * 16 : valid, from ? bytes(c, head_dim) : 0);
    }
  }
};

// Plain data of whole 16-byte pieces (or of one small one) from and to shared memory.
template <class T>
INTERNVL_PTX_FN T load_struct(uint32_t addr) {
  if constexpr (ptx::kLoadable<T>) {
    return ptx::ld_shared<T>(addr);
  } else {
    static_assert(sizeof(T) % 8 == 0, "load_struct reads whole 8-byte pieces");
    struct Pieces {
      ptx::U32x2 at[sizeof(T) / 8];
    } pieces;
    INTERNVL_UNROLL
    for (int i = 0; i < int(sizeof(T) / 8); ++i)
      pieces.at[i] = ptx::ld_shared<ptx::U32x2>(addr + 8 * i);
    return ptx::bits_as<T>(pieces);
  }
}

template <class T>
INTERNVL_PTX_FN void store_struct(uint32_t addr, const T& value) {
  static_assert(sizeof(T) % 8 == 0, "store_struct writes whole 8-byte pieces");
  struct Pieces {
    ptx::U32x2 at[sizeof(T) / 8];
  };
  const Pieces pieces = ptx::bits_as<Pieces>(value);
  INTERNVL_UNROLL
  for (int i = 0; i < int(sizeof(T) / 8); ++i) ptx::st_shared(addr + 8 * i, pieces.at[i]);
}

// Up to 8 elements of a row to global memory, in one store where the row allows it.
INTERNVL_PTX_FN void store_chunk(char* dst, const ptx::U32x4& value, int elements, bool aligned) {
  if (elements >= 8 && aligned) {
    ptx::st_global(reinterpret_cast<ptx::U32x4*>(dst), value);
    return;
  }
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
  INTERNVL_UNROLL
  for (int e = 0; e < 8; ++e)
    if (e < elements)
      ptx::st_global(reinterpret_cast<uint16_t*>(dst) + e,
                     static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16)));
}

}  // namespace internvl::tile
