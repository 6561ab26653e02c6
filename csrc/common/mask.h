// Mirror of python/internvl_kernels/semantics.py: same names, argument order and integer
// arithmetic. Host and device. The scalar functions also accept a lane vector for `j`, `p` or
// `flags`, so that the CPU kernels evaluate a whole vector of keys with the same source.
// tests/test_semantics.py compares this header with the specification exhaustively; the causal
// comparison is written in no other C++ file.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define INTERNVL_MASK_FN __host__ __device__ __forceinline__ static
#else
// Always inlined and internal: the header is compiled with several instruction sets into one
// library.
#define INTERNVL_MASK_FN __attribute__((always_inline, unused)) static inline
#endif

namespace internvl {

constexpr int kFlagValid = 1;
constexpr int kFlagBidirectional = 2;

enum TileClass : int { kTileEmpty = 0, kTilePartial = 1, kTileFull = 2 };

INTERNVL_MASK_FN int64_t query_position(int64_t query_start, int64_t i) { return query_start + i; }

template <class J, class I>
INTERNVL_MASK_FN auto valid_in_range(J j, I start, I end) {
  return (j >= start) & (j < end);
}

template <class J, class I>
INTERNVL_MASK_FN auto bidirectional_in_prefix(J j, I prefix_len) {
  return j < prefix_len;
}

template <class F>
INTERNVL_MASK_FN auto flag_valid(F flags) {
  return (flags & kFlagValid) != 0;
}

template <class F>
INTERNVL_MASK_FN auto flag_bidirectional(F flags) {
  return (flags & kFlagBidirectional) != 0;
}

// I is the scalar type of the positions: no distance reaches its maximum, so window 0 becomes "no
// limit".
template <class P, class J, class I>
INTERNVL_MASK_FN auto causal(P p, J j, I window) {
  constexpr I kNoLimit = static_cast<I>((uint64_t{1} << (8 * sizeof(I) - 1)) - 1);
  const I limit = window == 0 ? kNoLimit : window;
  return (j <= p) & (p - j < limit);
}

template <class A, class B, class C, class D>
INTERNVL_MASK_FN auto visible(A valid, B same_segment, C bidirectional, D is_causal) {
  return valid & same_segment & (bidirectional | is_causal);
}

INTERNVL_MASK_FN float alibi_bias(float slope, int64_t p, int64_t j) {
  return -slope * static_cast<float>(p < j ? j - p : p - j);
}

// A valid, fully causal run of keys: is some / every key visible to some / every position in [p_lo,
// p_hi]?
INTERNVL_MASK_FN bool causal_reaches(int64_t p_lo, int64_t p_hi, int64_t j_lo, int64_t j_hi,
                                     int64_t window) {
  return j_lo <= p_hi && (window == 0 || p_lo - (j_hi - 1) < window);
}

INTERNVL_MASK_FN bool causal_covers(int64_t p_lo, int64_t p_hi, int64_t j_lo, int64_t j_hi,
                                    int64_t window) {
  return j_hi - 1 <= p_lo && (window == 0 || p_hi - j_lo < window);
}

INTERNVL_MASK_FN int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
INTERNVL_MASK_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One past the last key that a query at or below position p_hi can see under the compact form.
INTERNVL_MASK_FN int64_t visible_key_end(int64_t p_hi, int64_t prefix_len, int64_t end) {
  return smaller(end, larger(prefix_len, p_hi + 1));
}

// The first key that some query at or above position p_lo can see causally.
INTERNVL_MASK_FN int64_t causal_key_begin(int64_t p_lo, int64_t window) {
  return window == 0 ? 0 : larger(0, p_lo - window + 1);
}

// Class of the tile of query positions [p_lo, p_hi] and keys [j_lo, j_hi) under the compact form;
// exact.
INTERNVL_MASK_FN TileClass classify_tile(int64_t p_lo, int64_t p_hi, int64_t j_lo, int64_t j_hi,
                                         int64_t prefix_len, int64_t start, int64_t end,
                                         int64_t window) {
  const int64_t a = larger(j_lo, start);
  const int64_t b = smaller(j_hi, end);
  if (a >= b) return kTileEmpty;
  if (!bidirectional_in_prefix(a, prefix_len) && !causal_reaches(p_lo, p_hi, a, b, window))
    return kTileEmpty;
  if (a > j_lo || b < j_hi) return kTilePartial;
  if (bidirectional_in_prefix(j_hi - 1, prefix_len)) return kTileFull;
  return causal_covers(p_lo, p_hi, larger(j_lo, prefix_len), j_hi, window) ? kTileFull
                                                                           : kTilePartial;
}

// What a key tile's flags and segments look like as a whole. `any` and `all` of bidirectional are
// over valid keys; the segment bounds are over all keys of the tile.
struct KeyTileSummary {
  bool any_valid = true;
  bool all_valid = true;
  bool any_bidirectional = false;
  bool all_bidirectional = false;
  int32_t segment_lo = 0;
  int32_t segment_hi = 0;
};

// Under key flags: never empty when something is visible, never full when something is not.
INTERNVL_MASK_FN TileClass classify_tile_flags(int64_t p_lo, int64_t p_hi, int64_t j_lo,
                                               int64_t j_hi, bool any_valid, bool all_valid,
                                               bool any_bidirectional, bool all_bidirectional,
                                               int64_t window) {
  if (!any_valid) return kTileEmpty;
  if (!any_bidirectional && !causal_reaches(p_lo, p_hi, j_lo, j_hi, window)) return kTileEmpty;
  if (!all_valid) return kTilePartial;
  return all_bidirectional || causal_covers(p_lo, p_hi, j_lo, j_hi, window) ? kTileFull
                                                                            : kTilePartial;
}

// Under segments: queries hold ids in [q_lo, q_hi], keys in [k_lo, k_hi].
INTERNVL_MASK_FN TileClass classify_tile_segments(int64_t q_lo, int64_t q_hi, int64_t k_lo,
                                                  int64_t k_hi) {
  if (q_hi < k_lo || k_hi < q_lo) return kTileEmpty;
  return q_lo == q_hi && k_lo == k_hi ? kTileFull : kTilePartial;
}

// Both rules hold at once.
INTERNVL_MASK_FN TileClass combine_classes(TileClass a, TileClass b) {
  if (a == kTileEmpty || b == kTileEmpty) return kTileEmpty;
  return a == kTileFull && b == kTileFull ? kTileFull : kTilePartial;
}

// A position clamped so that int32 arithmetic is safe and every `causal` answer stays the same.
INTERNVL_MASK_FN int32_t clamp_position(int64_t p, int64_t seqlen_k, int64_t window) {
  return static_cast<int32_t>(larger(-1, smaller(p, seqlen_k + window)));
}

}  // namespace internvl
