// Plan and launches of prefix_attn for few query rows; included by the rendered instances and by
// the emulator.
#pragma once

#include <algorithm>

#include "cuda/attn_fwd_plan.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/sm80/prefix_attn_decode.h"
#include "cuda/sm80/prefix_attn_decode_kernel.cuh"

namespace internvl::sm80 {
namespace decode {

// Norms of the keys, for distance pruning, cost half of the reading that pruning can save: it is
// for calls that read this much per multiprocessor ...
constexpr int64_t kPruneBytesPerSm = 512 << 10;
// ... and for heads that keep clearly less than half of their keys: `kSpread` is how much a row's
// best score exceeds that of a key at which pruning stops, beside the threshold.
constexpr float kSpread = 16.0f;
constexpr float kKeptShare = 0.4f;

inline bool may_prune(const PrefixAttnParams& params, int block_n, const DeviceInfo& device) {
  const int64_t bytes = params.batch * params.heads_kv * params.seqlen_k * params.head_dim * 4;
  return cuda::may_prune(params, block_n) && bytes >= kPruneBytesPerSm * device.multiprocessors;
}

inline float least_slope(const PrefixAttnParams& params) {
  return (prune_threshold(params.dtype, params.seqlen_k) + kSpread) /
         (kKeptShare * static_cast<float>(std::max<int64_t>(params.seqlen_k, 1)));
}

// Key tiles that a block meets at most.
inline int64_t most_tiles(const PrefixAttnParams& params, int block_n) {
  const int64_t all = (params.seqlen_k + block_n - 1) / block_n;
  if (params.window == 0 || params.prefix_len || params.key_flags) return all;
  return std::min(all, (params.window + params.seqlen_q + block_n - 1) / block_n + 1);
}

// Blocks that share the keys of a row tile: none where the tiles nearly fill the `slots` of the
// device anyway, else as few as come close to the best filling of the last wave.
inline int splits_of(int64_t blocks, int64_t key_tiles, int64_t slots) {
  if (10 * blocks >= 8 * slots || key_tiles <= 4) return 1;
  const int64_t most = std::min({int64_t{kMaxSplits}, slots, key_tiles});
  const auto per_split = [&](int64_t splits) { return (key_tiles + splits - 1) / splits; };
  const auto filling = [&](int64_t splits) {
    if (splits > 1 && per_split(splits) == per_split(splits - 1)) return 0.0;  // no shorter
    const double waves = static_cast<double>(blocks * splits) / slots;
    return waves / ((blocks * splits + slots - 1) / slots);
  };
  double best = 0.0;
  for (int64_t splits = 1; splits <= most; ++splits) best = std::max(best, filling(splits));
  int64_t splits = 1;
  while (filling(splits) < 0.85 * best) ++splits;
  return static_cast<int>(splits);
}

template <class Traits>
LaunchStatus prepare(cuda::Workspace& workspace, DecodePlan& plan, const DeviceInfo& device,
                     void* stream) {
  tile::FwdPlan& fwd = plan.fwd;
  PrefixAttnParams& params = fwd.params;
  LaunchStatus status = cuda::align_inputs(workspace, &params, stream);
  if (!status.ok()) return status;
  plan.least_slope = least_slope(params);
  cuda::Prepass prepass;
  status = cuda::run_prepass(workspace, params, Traits::kBlockN,
                             may_prune(params, Traits::kBlockN, device), stream, &prepass,
                             plan.least_slope);
  if (!status.ok()) return status;
  fwd.summaries = {static_cast<const ptx::U32x4*>(prepass.tiles), prepass.used};
  fwd.key_norms = prepass.key_norms;
  fwd.prune_threshold = prepass.prune_threshold;
  fwd.tile_count = static_cast<int>(prepass.tile_count);
  fwd.pack = static_cast<int>(params.group());
  fwd.heads = fwd.heads_per_section = static_cast<int>(params.batch * params.heads_kv);
  fwd.out_aligned = cuda::rows_aligned(params.out, params.batch, params.seqlen_q, params.heads_q);
  const int64_t rows = params.seqlen_q * params.group();
  fwd.row_tiles = static_cast<int>((rows + Traits::kBlockM - 1) / Traits::kBlockM);
  plan.row_warps = rows <= 16 ? 1 : rows <= 32 ? 2 : Traits::kBlockM / 16;
  const int64_t tiles = int64_t{fwd.row_tiles} * fwd.heads;
  plan.splits = splits_of(tiles, most_tiles(params, Traits::kBlockN),
                          int64_t{device.multiprocessors} * Traits::kBlocksPerSm);
  if (plan.splits == 1) return {};
  const int64_t parts = tiles * plan.splits * Traits::kBlockM;
  plan.sums = workspace.take<float>(parts * Traits::kHeadDim);
  plan.stats = workspace.take<ptx::F32x2>(parts);
  plan.tickets = workspace.take<uint32_t>(tiles);
  return workspace.counting() ? LaunchStatus{} : cuda::zero_words(plan.tickets, tiles, stream);
}

}  // namespace decode

template <class T, int kHeadDim>
int64_t prefix_attn_decode_workspace_bytes(const PrefixAttnParams& params,
                                           const DeviceInfo& device) {
  cuda::Workspace workspace;
  DecodePlan plan;
  plan.fwd.params = params;
  decode::prepare<PrefixAttnDecodeTraits<T, kHeadDim>>(workspace, plan, device, nullptr);
  return workspace.bytes();
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_decode(const PrefixAttnParams& params, const DeviceInfo& device,
                                void* memory, void* stream) {
  using Traits = PrefixAttnDecodeTraits<T, kHeadDim>;
  constexpr int kSharedBytes = sizeof(DecodeShared<Traits>);
  if (device.max_shared_bytes < kSharedBytes)
    return {"prefix_attn: a block needs " + std::to_string(kSharedBytes) +
            " bytes of shared memory; the device allows " +
            std::to_string(device.max_shared_bytes)};
  const int64_t rows = params.seqlen_q * params.group();
  const int64_t row_tiles = (rows + Traits::kBlockM - 1) / Traits::kBlockM;
  if (row_tiles * params.batch * params.heads_kv > cuda::kMaxFwdBlocks ||
      cuda::too_many_tiles(params, Traits::kBlockN))
    return {"prefix_attn: more tiles than a grid holds"};
  cuda::Workspace workspace(memory);
  DecodePlan plan;
  plan.fwd.params = params;
  const LaunchStatus status = decode::prepare<Traits>(workspace, plan, device, stream);
  if (!status.ok()) return status;
  ptx::LaunchConfig config;
  config.name = "prefix_attn_decode";
  config.grid.x = static_cast<unsigned>(plan.fwd.row_tiles) * static_cast<unsigned>(plan.fwd.heads);
  config.grid.y = static_cast<unsigned>(plan.splits);
  config.threads = Traits::kThreads;
  config.shared_bytes = kSharedBytes;
  config.stream = stream;
  return ptx::launch(prefix_attn_decode_kernel<Traits>, config, plan);
}

}  // namespace internvl::sm80
