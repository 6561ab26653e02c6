// Tiles of the Hopper backward and what its kernels are told. See NOTES.md for the schedule.
#pragma once

#include "cuda/ptx/tensor_map.h"
#include "cuda/tile/attn_grad.cuh"
#include "cuda/tile/wgmma_layout.cuh"

namespace internvl::sm90 {

// A block: two warpgroups that compute, and one of which a single warp starts the copies.
constexpr int kWarpgroupThreads = 128;
constexpr int kConsumers = 2;
constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
constexpr int kBoxRows = 64;  // of one tensor copy
constexpr size_t kMaxSharedBytes = 227 * 1024;

// kernel_kv: a block owns kBlockN keys of a KV head and walks over tiles of kBlockM query rows,
// kRowStages of them in shared memory. kernel_q: a block owns kBlockRows query rows of a head and
// walks over tiles of kBlockKeys keys; K and V have stages of their own.
// kWide: dK and dV of 64 keys are more than a warpgroup's registers hold: one has dV, one has dK.
template <int kHeadDim>
struct BwdTiles;

template <>
struct BwdTiles<64> {
  static constexpr int kBlockM = 64, kBlockN = 128, kRowStages = 4;
  static constexpr int kBlockRows = 128, kBlockKeys = 128, kKStages = 3, kVStages = 3;
  static constexpr bool kWide = false;
};

template <>
struct BwdTiles<96> {
  static constexpr int kBlockM = 64, kBlockN = 128, kRowStages = 3;
  static constexpr int kBlockRows = 128, kBlockKeys = 128, kKStages = 2, kVStages = 2;
  static constexpr bool kWide = false;
};

template <>
struct BwdTiles<128> {
  static constexpr int kBlockM = 64, kBlockN = 128, kRowStages = 3;
  static constexpr int kBlockRows = 128, kBlockKeys = 128, kKStages = 2, kVStages = 2;
  static constexpr bool kWide = false;
};

template <>
struct BwdTiles<192> {
  static constexpr int kBlockM = 64, kBlockN = 64, kRowStages = 3;
  static constexpr int kBlockRows = 128, kBlockKeys = 64, kKStages = 3, kVStages = 2;
  static constexpr bool kWide = true;
};

template <>
struct BwdTiles<256> {
  static constexpr int kBlockM = 64, kBlockN = 64, kRowStages = 2;
  static constexpr int kBlockRows = 128, kBlockKeys = 64, kKStages = 2, kVStages = 1;
  static constexpr bool kWide = true;
};

template <class T, int kHeadDimValue>
struct BwdTraits : BwdTiles<kHeadDimValue> {
  using Element = T;
  using Tiles = BwdTiles<kHeadDimValue>;
  static constexpr int kHeadDim = kHeadDimValue;
  // Query tiles of kernel_kv and key tiles of kernel_q that make a block's own side of the other.
  static constexpr int kRowParts = Tiles::kBlockRows / Tiles::kBlockM;
  static constexpr int kKeyParts = Tiles::kBlockN / Tiles::kBlockKeys;
  static_assert(Tiles::kBlockN == (Tiles::kWide ? 64 : kConsumers * 64) &&
                    Tiles::kBlockRows == kConsumers * 64,
                "64 rows of the owned side per warpgroup, or per block");
  static_assert(Tiles::kBlockM % kBoxRows == 0 && Tiles::kBlockKeys % kBoxRows == 0,
                "whole tensor copies");
};

// One call: what its kernels read, and the tensor maps of what they stream (boxes of kBoxRows rows
// and one panel of columns).
struct BwdPlan {
  tile::BwdArgs args;
  ptx::TensorMap q, k, v, grad_out;  // [head_dim, seqlen, heads, batch]
};

}  // namespace internvl::sm90
