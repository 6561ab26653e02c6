// Decoding with up to kDotRows query rows per KV head: K and V are read once, where they stand, and
// bound by that. Scores are dot products of a key with the queries, whose sums one transposition
// turns into lanes; values are added to accumulators in the first-level cache.
#pragma once

#include "cpu/decode_softmax.h"
#include "cpu/two_vecs.h"

namespace internvl::cpu::INTERNVL_ISA {
namespace {

// Queries and accumulators are in TwoVecs order.
template <DType kType>
INTERNVL_INLINE void load_query_of_dots(const typename Element<kType>::type* row, int64_t width,
                                        float factor, float* q) {
  for (int64_t d = 0; d < width; d += kTwo) {
    const TwoVecs x =
        d + kTwo <= width ? load_two<kType>(row + d) : load_two_partial<kType>(row + d, width - d);
    store(q + d, x.first * factor);
    store(q + d + kLanes, x.second * factor);
  }
}

// The rows of a task's heads; zeros for keys that no query sees.
template <DType kType>
struct Rows {
  using T = typename Element<kType>::type;
  const T* data;  // of key 0, head 0 of the task
  int64_t stride_s, stride_h;
  const uint8_t* used;
  bool heads_inner;  // the heads of a key lie side by side, else the keys of a head
  int64_t width;
  int64_t keys_ahead;  // prefetched: memory's latency, and pages the processor does not cross

  INTERNVL_INLINE Rows(const DecodePlan& plan, const DecodeTask& task, const View& view)
      : data(row_of<kType>(view, task.b, 0, task.head0)),
        stride_s(view.stride_s),
        stride_h(view.stride_h),
        used(plan.keys.used + task.b * plan.params.seqlen_k),
        heads_inner(task.heads > 1 && view.stride_h < view.stride_s),
        width(plan.params.head_dim) {
    const int64_t run = (heads_inner ? task.heads : 1) * width * sizeof(T);
    keys_ahead = (kBytesAhead + run - 1) / run;
  }

  INTERNVL_INLINE const T* at(int64_t j, int64_t end, int64_t head) const {
    static const T kZeros[kMaxHeadDim] = {};
    return j < end && used[j] ? data + j * stride_s + head * stride_h : kZeros;
  }

  INTERNVL_INLINE void prefetch(int64_t j, int64_t end, int64_t head) const {
    prefetch_row(data + smaller(j + keys_ahead, end - 1) * stride_s + head * stride_h, width);
  }

  // Calls body(j, head) for every kKeys-th key and kHeads-th head, in the order of memory.
  template <int kKeys, int kHeads, class Body>
  INTERNVL_INLINE void walk(int64_t begin, int64_t end, int64_t heads, const Body& body) const {
    if (heads_inner)
      for (int64_t j = begin; j < end; j += kKeys)
        for (int64_t head = 0; head < heads; head += kHeads) body(j, head);
    else
      for (int64_t head = 0; head < heads; head += kHeads)
        for (int64_t j = begin; j < end; j += kKeys) body(j, head);
  }

 private:
  static constexpr int64_t kBytesAhead = 8192;
};

// out[r] = the products of kHeadRows queries, `stride` apart, with one row, still to be summed.
template <DType kType, int kHeadRows>
INTERNVL_INLINE void dot_row(const float* q, int64_t stride, const typename Element<kType>::type* x,
                             int64_t width, Vec* out) {
  Vec first[kHeadRows] = {}, second[kHeadRows] = {};
  const auto add = [&](int64_t d, TwoVecs key) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kHeadRows; ++r) {
      first[r] += key.first * load(q + r * stride + d);
      second[r] += key.second * load(q + r * stride + d + kLanes);
    }
  };
  int64_t d = 0;
  for (; d + kTwo <= width; d += kTwo) add(d, load_two<kType>(x + d));
  if (d < width) add(d, load_two_partial<kType>(x + d, width - d));
#pragma GCC unroll 4
  for (int r = 0; r < kHeadRows; ++r) out[r] = first[r] + second[r];
}

// s[j][lane] = <q[lane], key j of the lane's head> for the keys [begin, end) of the tile at
// `begin`; kLanes sums at a time, from neighbouring heads of a key or neighbouring keys of a head.
template <DType kType, int kHeadRows, bool kHeadsInner>
__attribute__((noinline)) void dot_scores(const DecodePlan& plan, const DecodeTask& task,
                                          const DecodeScratch& scratch, int64_t begin,
                                          int64_t end) {
  constexpr int kTogether = kLanes / kHeadRows;
  const Rows<kType> k(plan, task, plan.params.k);
  const int64_t stride = plan.padded_dim;
  const auto body = [&](int64_t j, int64_t head) __attribute__((always_inline)) {
    Vec sums[kLanes] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kTogether; ++i) {
      const int64_t key = kHeadsInner ? j : j + i, h = kHeadsInner ? head + i : head;
      if (kHeadsInner ? h >= task.heads : key >= end) continue;
      k.prefetch(key, end, h);
      dot_row<kType, kHeadRows>(scratch.q + h * kHeadRows * stride, stride, k.at(key, end, h),
                                k.width, sums + i * kHeadRows);
    }
    transpose(sums);
#pragma GCC unroll 16
    for (int i = kLanes / 2; i > 0; i /= 2)
#pragma GCC unroll 16
      for (int n = 0; n < i; ++n) sums[n] += sums[n + i];
    float* s = scratch.s + (j - begin) * plan.lanes + head * kHeadRows;
    if (kHeadsInner) {
      store(s, sums[0]);
      return;
    }
    for (int i = 0; i < kTogether && j + i < end; ++i)
      for (int r = 0; r < kHeadRows; ++r) s[i * plan.lanes + r] = sums[0][i * kHeadRows + r];
  };
  k.template walk<kHeadsInner ? 1 : kTogether, kHeadsInner ? kTogether : 1>(begin, end, task.heads,
                                                                            body);
}

// acc[lane][:] += sum_j s[j][lane] * value j of the lane's head. A few keys share each visit to the
// accumulators; s must hold zeros up to a multiple of four keys.
template <DType kType, int kHeadRows>
__attribute__((noinline)) void dot_values(const DecodePlan& plan, const DecodeTask& task,
                                          const DecodeScratch& scratch, int64_t begin,
                                          int64_t end) {
  using T = typename Element<kType>::type;
  constexpr int kKeys = kHeadRows == 4 ? 2 : 4;
  const Rows<kType> v(plan, task, plan.params.v);
  const int64_t stride = plan.padded_dim;
  v.template walk<kKeys, 1>(
      begin, end, task.heads, [&](int64_t j, int64_t head) __attribute__((always_inline)) {
        const float* p = scratch.s + (j - begin) * plan.lanes + head * kHeadRows;
        float* acc = scratch.acc + head * kHeadRows * stride;
        const T* rows[kKeys];
        Vec weight[kKeys][kHeadRows];
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; ++i) {
          rows[i] = v.at(j + i, end, head);
          v.prefetch(j + i, end, head);
#pragma GCC unroll 4
          for (int r = 0; r < kHeadRows; ++r) weight[i][r] = broadcast(p[i * plan.lanes + r]);
        }
        const auto add = [&](int64_t d, const auto& value) __attribute__((always_inline)) {
          Vec first[kHeadRows], second[kHeadRows];
#pragma GCC unroll 4
          for (int r = 0; r < kHeadRows; ++r) {
            first[r] = load(acc + r * stride + d);
            second[r] = load(acc + r * stride + d + kLanes);
          }
#pragma GCC unroll 4
          for (int i = 0; i < kKeys; ++i) {
            const TwoVecs x = value(rows[i] + d);
#pragma GCC unroll 4
            for (int r = 0; r < kHeadRows; ++r) {
              first[r] += weight[i][r] * x.first;
              second[r] += weight[i][r] * x.second;
            }
          }
#pragma GCC unroll 4
          for (int r = 0; r < kHeadRows; ++r) {
            store(acc + r * stride + d, first[r]);
            store(acc + r * stride + d + kLanes, second[r]);
          }
        };
        int64_t d = 0;
        for (; d + kTwo <= v.width; d += kTwo)
          add(d, [](const T* x) __attribute__((always_inline)) { return load_two<kType>(x); });
        if (d < v.width)
          add(d, [&](const T* x) __attribute__((always_inline)) {
            return load_two_partial<kType>(x, v.width - d);
          });
      });
}

template <DType kType, int kHeadRows>
INTERNVL_INLINE void add_tile_by_dots(const DecodePlan& plan, const DecodeTask& task,
                                      const KeyMask& mask, const DecodeScratch& scratch,
                                      bool partial, int64_t j_lo, int64_t keys) {
  const View& k = plan.params.k;
  if (k.stride_h < k.stride_s && task.heads >= kLanes / kHeadRows)
    dot_scores<kType, kHeadRows, true>(plan, task, scratch, j_lo, j_lo + keys);
  else
    dot_scores<kType, kHeadRows, false>(plan, task, scratch, j_lo, j_lo + keys);
  decode_softmax(plan, mask, scratch, partial, j_lo, keys);
  for (int64_t i = keys * plan.lanes; i < round_up(keys, 4) * plan.lanes; i += kLanes)
    store(scratch.s + i, Vec{});
  dot_values<kType, kHeadRows>(plan, task, scratch, j_lo, j_lo + keys);
}

}  // namespace
}  // namespace internvl::cpu::INTERNVL_ISA
