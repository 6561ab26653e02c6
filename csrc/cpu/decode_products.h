// Decoding with more query rows: S^T = K Q^T and acc += (S^T)^T V with the micro-kernels of gemm.h,
// bound by arithmetic. K in fp32, or as pairs of bf16, is an operand as it stands; what needs a
// conversion is converted a few keys at a time, while the next ones are fetched.
#pragma once

#include "cpu/decode_softmax.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

template <DType kType>
INTERNVL_INLINE auto head_keys(const DecodePlan& plan, const DecodeTask& task, const View& view,
                               int64_t h, int64_t j_lo) {
  return key_rows<kType>(plan.params, plan.keys.used, view, task.b, task.head0 + h, j_lo);
}

// Keys as the row-major operand of S^T = K Q^T: where they stand when they are such an operand
// already, else converted into `memory`.
template <Operand kOperand, DType kType, class Row>
INTERNVL_INLINE const float* key_operand(const View& view, const uint8_t* used, const Row& row,
                                         int64_t keys, int64_t width, float* memory,
                                         int64_t* stride) {
  constexpr int64_t kStep = kOperand == Operand::kPairs ? 2 : 1;
  bool as_it_stands = kOperand == Operand::kPairs || kType == DType::kFloat32;
  for (int64_t j = 0; j < keys; ++j) as_it_stands &= used[j] != 0;
  as_it_stands &= width % kStep == 0 && view.stride_s % kStep == 0;
  if (as_it_stands && reinterpret_cast<uintptr_t>(row(0)) % sizeof(float) == 0) {
    *stride = view.stride_s / kStep;
    return reinterpret_cast<const float*>(row(0));
  }
  pack_rows<kOperand, kType>(row, keys, width, 1.0f, memory);
  *stride = row_elements<kOperand>(width);
  return memory;
}

// The keys to be read next, prefetched a few at a time between products: all at once they would
// wait for each other, and the products for them.
template <DType kType>
struct Upcoming {
  using T = typename Element<kType>::type;
  const T* row;
  int64_t stride, rows, width;

  INTERNVL_INLINE Upcoming(const DecodePlan& plan, const DecodeTask& task, const View& view,
                           int64_t h, int64_t j)
      : row(row_of<kType>(view, task.b, j, task.head0 + h)),
        stride(view.stride_s),
        rows(smaller(kStagedKeys, plan.params.seqlen_k - j)),
        width(plan.params.head_dim) {}

  INTERNVL_INLINE void fetch(int64_t count) {
    for (; count > 0 && rows > 0; --count, --rows, row += stride) prefetch_row(row, width);
  }
};

template <DType kType>
__attribute__((noinline)) void product_scores(const DecodePlan& plan, const DecodeTask& task,
                                              const DecodeScratch& scratch, int64_t j_lo,
                                              int64_t keys) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  const int64_t depth = elements<kOperand>(params.head_dim);
  const uint8_t* used = plan.keys.used + task.b * params.seqlen_k;
  for (int64_t h = 0; h < task.heads; ++h)
    for (int64_t j = 0; j < keys; j += kStagedKeys) {
      const int64_t count = smaller(kStagedKeys, keys - j);
      const bool last = j + kStagedKeys >= keys;
      Upcoming<kType> next =
          !last                ? Upcoming<kType>(plan, task, params.k, h, j_lo + j + kStagedKeys)
          : h + 1 < task.heads ? Upcoming<kType>(plan, task, params.k, h + 1, j_lo)
                               : Upcoming<kType>(plan, task, params.v, 0, j_lo);
      int64_t stride;
      const float* k = key_operand<kOperand, kType>(
          params.k, used + j_lo + j, head_keys<kType>(plan, task, params.k, h, j_lo + j), count,
          params.head_dim, scratch.k, &stride);
      for (int64_t r = 0; r < count; r += kRows) {
        next.fetch(kRows);
        multiply<kOperand, ALayout::kRowMajor>(
            smaller(kRows, count - r), plan.padded_rows, depth, k + r * stride, stride,
            scratch.q + h * plan.padded_rows * plan.padded_dim, depth,
            scratch.s + (j + r) * plan.lanes + h * plan.padded_rows, plan.lanes, false,
            params.softmax_scale * kLog2E);
      }
    }
}

// Probabilities as pairs of neighbouring keys, in place: row j of the result lies below what is
// still to be read.
INTERNVL_INLINE void pair_probabilities(int64_t keys, int64_t lanes, float* s) {
  for (int64_t j = 0; j < keys; j += 2)
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const VecH first = round_to_pairs(load(s + j * lanes + lane));
      const VecH second = round_to_pairs(load(s + (j + 1) * lanes + lane));
      store(s + j / 2 * lanes + lane, make_pairs(first, second));
    }
}

template <DType kType>
__attribute__((noinline)) void product_values(const DecodePlan& plan, const DecodeTask& task,
                                              const DecodeScratch& scratch, int64_t j_lo,
                                              int64_t keys) {
  constexpr Operand kOperand = kOperandOf<kType>;
  const PrefixAttnParams& params = plan.params;
  const int64_t next_tile = smaller(j_lo + plan.keys.block_n, params.seqlen_k);
  for (int64_t h = 0; h < task.heads; ++h)
    for (int64_t j = 0; j < keys; j += kStagedKeys) {
      const int64_t count = smaller(kStagedKeys, keys - j);
      const bool last = j + kStagedKeys >= keys;
      Upcoming<kType> next =
          !last                ? Upcoming<kType>(plan, task, params.v, h, j_lo + j + kStagedKeys)
          : h + 1 < task.heads ? Upcoming<kType>(plan, task, params.v, h + 1, j_lo)
                               : Upcoming<kType>(plan, task, params.k, 0, next_tile);
      const int64_t panel_depth = elements<kOperand>(round_up(count, 2));
      pack_column_panels<kOperand, kType>(head_keys<kType>(plan, task, params.v, h, j_lo + j),
                                          count, round_up(count, 2), params.head_dim,
                                          plan.padded_dim, scratch.v);
      for (int64_t d = 0; d < plan.padded_dim; d += kPanel) {
        next.fetch(kStagedKeys * kPanel / plan.padded_dim + 1);
        multiply<kOperand, ALayout::kColumnMajor>(
            plan.rows, panel_width(d, plan.padded_dim), elements<kOperand>(count),
            scratch.s + elements<kOperand>(j) * plan.lanes + h * plan.padded_rows, plan.lanes,
            scratch.v + d * panel_depth, panel_depth,
            scratch.acc + h * plan.padded_rows * plan.padded_dim + d, plan.padded_dim, true);
      }
    }
}

template <DType kType>
INTERNVL_INLINE void add_tile_by_products(const DecodePlan& plan, const DecodeTask& task,
                                          const KeyMask& mask, const DecodeScratch& scratch,
                                          bool partial, int64_t j_lo, int64_t keys) {
  product_scores<kType>(plan, task, scratch, j_lo, keys);
  decode_softmax(plan, mask, scratch, partial, j_lo, keys);
  if (kOperandOf<kType> == Operand::kPairs) {
    for (int64_t i = keys * plan.lanes; i < round_up(keys, 2) * plan.lanes; i += kLanes)
      store(scratch.s + i, Vec{});
    pair_probabilities(keys, plan.lanes, scratch.s);
  }
  product_values<kType>(plan, task, scratch, j_lo, keys);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
