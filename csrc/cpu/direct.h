// Products for a handful of query rows (decoding): K and V are read once, where they stand, instead
// of being packed. Packing costs as much as the product itself when a tile serves fewer rows than a
// micro-kernel has.
#pragma once

#include "cpu/pack.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr int64_t kDirectRows = 4;

// Rows of one head often stand a page apart ([batch, seqlen, heads, head_dim]), where the processor
// prefetches nothing by itself.
template <DType kType, class Row>
INTERNVL_INLINE void prefetch_rows(const Row& row, int64_t j, int64_t count, int64_t keys,
                                   int64_t width) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename Element<kType>::type));
  for (int64_t i = j; i < j + count && i < keys; ++i)
    if (const auto* next = row(i))
      for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(next + d);
}

// s[r][j] = <q[r], row(j)> for j < round_up(keys, kLanes); q is fp32 [rows][ldq], zero keys where
// row(j) is null. kLanes keys at a time: their dot products sit in kLanes accumulators that one
// transposition turns into a vector.
template <DType kType, class Row>
INTERNVL_INLINE void direct_scores(int64_t rows, int64_t keys, int64_t width, const float* q,
                                   int64_t ldq, const Row& row, float* s, int64_t lds) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t j = 0; j < keys; j += kLanes) {
    prefetch_rows<kType>(row, j + 2 * kLanes, kLanes, keys, width);
    const typename Element<kType>::type* k[kLanes];
    for (int i = 0; i < kLanes; ++i) k[i] = j + i < keys ? row(j + i) : nullptr;
    bool all = true;
    for (int i = 0; i < kLanes; ++i) all = all && k[i] != nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      Vec sums[kLanes] = {};
      const float* query = q + r * ldq;
      if (all) {
        for (int64_t d = 0; d < whole; d += kLanes) {
          const Vec x = load(query + d);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) sums[i] += x * Element<kType>::load_vec(k[i] + d);
        }
        if (whole < width) {
          const Vec x = load_partial<DType::kFloat32>(query + whole, width - whole);
          for (int i = 0; i < kLanes; ++i)
            sums[i] += x * load_partial<kType>(k[i] + whole, width - whole);
        }
      } else {
        for (int64_t d = 0; d < width; d += kLanes) {
          const Vec x = load_row<DType::kFloat32>(query, d, width);
          for (int i = 0; i < kLanes; ++i) sums[i] += x * load_row<kType>(k[i], d, width);
        }
      }
      transpose(sums);
      Vec total = sums[0];
      for (int i = 1; i < kLanes; ++i) total += sums[i];
      store(s + r * lds + j, total);
    }
  }
}

// acc[r][:] += sum_j s[r][j] * row(j); acc is fp32 [rows][padded]. Four keys share each visit to
// the accumulator.
template <DType kType, class Row>
INTERNVL_INLINE void direct_values(int64_t rows, int64_t keys, int64_t width, int64_t padded,
                                   const float* s, int64_t lds, const Row& row, float* acc) {
  const int64_t whole = width / kLanes * kLanes;
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    prefetch_rows<kType>(row, j + 16, 4, keys, width);
    const typename Element<kType>::type* v[4] = {row(j), row(j + 1), row(j + 2), row(j + 3)};
    const bool all = v[0] && v[1] && v[2] && v[3];
    for (int64_t r = 0; r < rows; ++r) {
      const float* p = s + r * lds + j;
      const Vec p0 = broadcast(p[0]), p1 = broadcast(p[1]), p2 = broadcast(p[2]),
                p3 = broadcast(p[3]);
      float* out = acc + r * padded;
      int64_t d = 0;
      for (; all && d < whole; d += kLanes) {
        const Vec even =
            p0 * Element<kType>::load_vec(v[0] + d) + p2 * Element<kType>::load_vec(v[2] + d);
        const Vec odd =
            p1 * Element<kType>::load_vec(v[1] + d) + p3 * Element<kType>::load_vec(v[3] + d);
        store(out + d, load(out + d) + (even + odd));
      }
      for (; d < padded; d += kLanes) {
        const Vec even =
            p0 * load_row<kType>(v[0], d, width) + p2 * load_row<kType>(v[2], d, width);
        const Vec odd = p1 * load_row<kType>(v[1], d, width) + p3 * load_row<kType>(v[3], d, width);
        store(out + d, load(out + d) + (even + odd));
      }
    }
  }
  for (; j < keys; ++j)
    for (int64_t r = 0; r < rows; ++r) {
      const Vec p = broadcast(s[r * lds + j]);
      for (int64_t d = 0; d < padded; d += kLanes)
        store(acc + r * padded + d,
              load(acc + r * padded + d) + p * load_row<kType>(row(j), d, width));
    }
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
