// Rows of K, V, Q and gradients as operands of gemm.h.
//
// `row(r)` is the address of source row r, or null for a row of zeros: what no query sees is packed
// as zeros, because 0 * NaN must not happen in a product.
#pragma once

#include "common/prune.h"
#include "cpu/gemm.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

template <DType kType>
INTERNVL_INLINE const typename Element<kType>::type* row_of(const View& view, int64_t b, int64_t s,
                                                            int64_t h) {
  return static_cast<const typename Element<kType>::type*>(view.data) + b * view.stride_b +
         s * view.stride_s + h * view.stride_h;
}

template <DType kType>
INTERNVL_INLINE typename Element<kType>::type* mutable_row_of(const View& view, int64_t b,
                                                              int64_t s, int64_t h) {
  return const_cast<typename Element<kType>::type*>(row_of<kType>(view, b, s, h));
}

// Rows that are read in turn lie a page or more apart in [B, S, H, D], where the processor
// prefetches nothing.
constexpr int64_t kRowsAhead = 8;

template <class T>
INTERNVL_INLINE void prefetch_row(const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + d);
}

// Row r of the key tile at j_lo, null when no query sees that key: its slot may hold anything.
template <DType kType>
INTERNVL_INLINE auto key_rows(const PrefixAttnParams& params, const uint8_t* used, const View& view,
                              int64_t b, int64_t head_kv, int64_t j_lo) {
  used += b * params.seqlen_k + j_lo;
  const int64_t rows = params.seqlen_k - j_lo;
  return [=, &view](int64_t r) {
    return r < rows && used[r] ? row_of<kType>(view, b, j_lo + r, head_kv) : nullptr;
  };
}

// kLanes numbers of a source row as fp32 from `d`, zero from `width` on.
template <DType kType>
INTERNVL_INLINE Vec load_row(const typename Element<kType>::type* row, int64_t d, int64_t width) {
  if (row == nullptr) return Vec{};
  if (d + kLanes <= width) return Element<kType>::load_vec(row + d);
  return d < width ? load_partial<kType>(row + d, width - d) : Vec{};
}

// kLanes elements of a source row from element `e`, zero beyond its `width` numbers.
template <Operand kOperand, DType kType>
INTERNVL_INLINE Vec load_elements(const typename Element<kType>::type* row, int64_t e,
                                  int64_t width) {
  if constexpr (kOperand == Operand::kFloat) {
    return load_row<kType>(row, e, width);
  } else {
    if (row == nullptr) return Vec{};
    const int64_t d = 2 * e;
    if (d + 2 * kLanes <= width) return load(reinterpret_cast<const float*>(row + d));
    alignas(Vec) typename Element<kType>::type lanes[2 * kLanes] = {};
    for (int64_t i = 0; d + i < width && i < 2 * kLanes; ++i) lanes[i] = row[d + i];
    return load(reinterpret_cast<const float*>(lanes));
  }
}

// The same where all kLanes elements exist.
template <Operand kOperand, DType kType>
INTERNVL_INLINE Vec load_whole(const typename Element<kType>::type* row, int64_t e) {
  if constexpr (kOperand == Operand::kPairs)
    return load(reinterpret_cast<const float*>(row + 2 * e));
  else
    return Element<kType>::load_vec(row + e);
}

// Whole vectors of elements in a row of `width` numbers; none in a row of zeros.
template <Operand kOperand, class T>
INTERNVL_INLINE int64_t whole_elements(const T* row, int64_t width) {
  return row == nullptr ? 0 : width / (kOperand == Operand::kPairs ? 2 : 1) / kLanes * kLanes;
}

// Elements between the rows of a row-major operand.
template <Operand kOperand>
INTERNVL_INLINE int64_t row_elements(int64_t width) {
  return round_up(elements<kOperand>(width), kLanes);
}

// -> row-major [rows][row_elements], fp32 times `factor`.
template <Operand kOperand, DType kType, class Row>
INTERNVL_INLINE void pack_rows(const Row& row, int64_t rows, int64_t width, float factor,
                               float* out) {
  const int64_t stride = row_elements<kOperand>(width);
  for (int64_t r = 0; r < rows; ++r, out += stride) {
    if (r + kRowsAhead < rows) prefetch_row(row(r + kRowsAhead), width);
    const auto* source = row(r);
    const int64_t whole = whole_elements<kOperand>(source, width);
    const auto scaled = [&](Vec x) __attribute__((always_inline)) {
      return kOperand == Operand::kFloat ? x * factor : x;
    };
    int64_t e = 0;
    for (; e < whole; e += kLanes) store(out + e, scaled(load_whole<kOperand, kType>(source, e)));
    for (; e < stride; e += kLanes)
      store(out + e, scaled(load_elements<kOperand, kType>(source, e, width)));
  }
}

// -> panels over the columns, [panel][elements of rows_padded][panel width]: the B operand of a
// product whose depth is the rows.
template <Operand kOperand, DType kType, class Row>
INTERNVL_INLINE void pack_column_panels(const Row& row, int64_t rows, int64_t rows_padded,
                                        int64_t width, int64_t padded, float* out) {
  constexpr int64_t kStep = kOperand == Operand::kPairs ? 2 : 1;
  const int64_t depth = elements<kOperand>(rows_padded);
  for (int64_t e = 0; e < depth; ++e) {
    const int64_t r = e * kStep;
    for (int64_t i = r + kRowsAhead; i < smallest(r + kRowsAhead + kStep, rows); ++i)
      prefetch_row(row(i), width);
    const typename Element<kType>::type* first = r < rows ? row(r) : nullptr;
    const typename Element<kType>::type* second = kStep == 2 && r + 1 < rows ? row(r + 1) : nullptr;
    const auto at = [&](int64_t d) __attribute__((always_inline)) {
      const Vec x = load_row<kType>(first, d, width);
      if constexpr (kOperand == Operand::kFloat) return x;
      return as_float((as_bits(x) >> 16) | as_bits(load_row<kType>(second, d, width)));
    };
    const int64_t whole = kOperand == Operand::kFloat && first ? width / kPanel * kPanel : 0;
    float* panel = out + e * kPanel;
    int64_t d = 0;
    for (; d < whole; d += kPanel, panel += depth * kPanel)
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n)
        store(panel + n * kLanes, Element<kType>::load_vec(first + d + n * kLanes));
    for (; d + kPanel <= padded; d += kPanel, panel += depth * kPanel)
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) store(panel + n * kLanes, at(d + n * kLanes));
    for (; d < padded; d += kLanes) store(out + d * depth + e * kLanes, at(d));
  }
}

// -> panels over the rows, [panel][elements of width][panel width]: the transposed B operand of a
// product whose depth is the width. rows_padded is a multiple of kLanes.
template <Operand kOperand, DType kType, class Row>
INTERNVL_INLINE void pack_row_panels(const Row& row, int64_t rows, int64_t rows_padded,
                                     int64_t width, float factor, float* out) {
  const int64_t depth = elements<kOperand>(width);
  for (int64_t r0 = 0; r0 < rows_padded; r0 += kLanes) {
    const int64_t first = r0 / kPanel * kPanel;
    const int64_t stride = panel_width(first, rows_padded);
    float* panel = out + first * depth + (r0 - first);
    const typename Element<kType>::type* source[kLanes];
    int64_t whole = depth;
    for (int i = 0; i < kLanes; ++i) {
      if (r0 + kLanes + i < rows) prefetch_row(row(r0 + kLanes + i), width);
      source[i] = r0 + i < rows ? row(r0 + i) : nullptr;
      whole = smallest(whole, whole_elements<kOperand>(source[i], width));
    }
    for (int64_t e = 0; e < depth; e += kLanes) {
      Vec block[kLanes];
      if (e < whole)
        for (int i = 0; i < kLanes; ++i) block[i] = load_whole<kOperand, kType>(source[i], e);
      else
        for (int i = 0; i < kLanes; ++i)
          block[i] = load_elements<kOperand, kType>(source[i], e, width);
      if constexpr (kOperand == Operand::kFloat)
        for (int i = 0; i < kLanes; ++i) block[i] *= factor;
      transpose(block);
      const int64_t count = smallest(kLanes, depth - e);
      for (int64_t i = 0; i < count; ++i) store(panel + (e + i) * stride, block[i]);
    }
  }
}

// At least |row|; NaN or infinite when the row is not finite.
template <DType kType>
INTERNVL_INLINE float row_norm(const typename Element<kType>::type* row, int64_t width) {
  Vec squares{};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec x = load_row<kType>(row, d, width);
    squares += x * x;
  }
  return prune_norm(horizontal_sum(squares));
}

// An upper bound of the norms of a tile's visible keys; +inf where K or V hold NaN or infinities,
// which must reach every row that sees them.
template <DType kType>
float key_tile_norm(const PrefixAttnParams& params, const uint8_t* used, int64_t b, int64_t head_kv,
                    int64_t j_lo, int64_t block_n) {
  const auto k_row = key_rows<kType>(params, used, params.k, b, head_kv, j_lo);
  const auto v_row = key_rows<kType>(params, used, params.v, b, head_kv, j_lo);
  const int64_t rows = smallest(block_n, params.seqlen_k - j_lo);
  float largest = 0.0f;
  Vec odd{};  // 0, or NaN once something was not finite
  for (int64_t r = 0; r < rows; ++r) {
    const auto* k = k_row(r);
    const auto* v = v_row(r);
    if (k == nullptr) continue;
    Vec squares{};
    for (int64_t d = 0; d < params.head_dim; d += kLanes) {
      const Vec x = load_row<kType>(k, d, params.head_dim);
      squares += x * x;
      odd += x * 0.0f + load_row<kType>(v, d, params.head_dim) * 0.0f;
    }
    const float sum = horizontal_sum(squares);
    largest = largest < sum ? sum : largest;
  }
  return horizontal_sum(odd) == 0.0f ? prune_norm(largest) : __builtin_inff();
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
