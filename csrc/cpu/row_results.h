// From accumulators to out and lse: one finished row, or the parts of a row whose keys were split.
#pragma once

#include "cpu/pack.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

INTERNVL_INLINE float natural_lse(float row_max_log2, float row_sum) {
  if (row_max_log2 == kInfinity || row_sum == 0.0f) return row_sum == 0.0f ? -kInfinity : kInfinity;
  return kLn2 * row_max_log2 + __builtin_logf(row_sum);  // NaN sums stay NaN
}

// out and lse of one finished row. A sum of 0 means that nothing was visible: out is 0 and lse
// -inf.
template <DType kType>
INTERNVL_INLINE void store_out_lse(const PrefixAttnParams& params, int64_t b, int64_t i,
                                   int64_t head, const float* acc, float row_max, float row_sum) {
  auto* out = mutable_row_of<kType>(params.out, b, i, head);
  const float inverse = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  int64_t d = 0;
  for (; d + kLanes <= params.head_dim; d += kLanes)
    Element<kType>::store_vec(out + d, load(acc + d) * inverse);
  if (d < params.head_dim)
    store_partial<kType>(out + d, load(acc + d) * inverse, params.head_dim - d);
  params.lse[(b * params.heads_q + head) * params.seqlen_q + i] = natural_lse(row_max, row_sum);
}

// One row's share of a key split: its accumulator, then its maximum and its sum.
INTERNVL_INLINE void store_partial_row(const float* acc, int64_t padded_dim, float row_max,
                                       float row_sum, float* partial) {
  for (int64_t d = 0; d < padded_dim; d += kLanes) store(partial + d, load(acc + d));
  partial[padded_dim] = row_max;
  partial[padded_dim + 1] = row_sum;
}

// Adds `count` such shares, `stride` floats apart, in their order; `acc` is room for one row.
template <DType kType>
INTERNVL_INLINE void merge_row(const PrefixAttnParams& params, int64_t b, int64_t i, int64_t head,
                               const float* parts, int64_t count, int64_t stride,
                               int64_t padded_dim, float* acc) {
  float row_max = -kInfinity;
  for (int64_t part = 0; part < count; ++part) {
    const float other = parts[part * stride + padded_dim];
    row_max = row_max < other ? other : row_max;
  }
  const float shift = row_max == -kInfinity ? 0.0f : row_max;
  float row_sum = 0.0f;
  for (int64_t d = 0; d < padded_dim; d += kLanes) store(acc + d, Vec{});
  for (int64_t part = 0; part < count; ++part) {
    const float* share = parts + part * stride;
    const Vec weight = exp2(broadcast(share[padded_dim] - shift));
    row_sum += weight[0] * share[padded_dim + 1];
    for (int64_t d = 0; d < padded_dim; d += kLanes)
      store(acc + d, load(acc + d) + weight * load(share + d));
  }
  store_out_lse<kType>(params, b, i, head, acc, row_max, row_sum);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
