// What the host decides about few query rows, whichever decode kernel serves them.
#pragma once

#include <algorithm>

#include "cuda/attn_fwd_plan.cuh"
#include "cuda/device_info.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/tile/attn_decode_schedule.cuh"

namespace internvl::cuda {
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
  const int64_t most = std::min({int64_t{tile::kMaxSplits}, slots, key_tiles});
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

}  // namespace decode

// Rows of a KV head: of all its query heads.
inline int64_t decode_rows(const PrefixAttnParams& params) {
  return params.seqlen_q * params.group();
}

// The aligned views, the prepasses, the splits and their memory; launches nothing while the
// workspace only counts.
template <class Traits>
LaunchStatus plan_decode(Workspace& workspace, tile::DecodePlan& plan, const DeviceInfo& device,
                         void* stream) {
  tile::FwdPlan& fwd = plan.fwd;
  PrefixAttnParams& params = fwd.params;
  LaunchStatus status = align_inputs(workspace, &params, stream);
  if (!status.ok()) return status;
  plan.least_slope = decode::least_slope(params);
  Prepass prepass;
  status = run_prepass(workspace, params, Traits::kBlockN,
                       decode::may_prune(params, Traits::kBlockN, device), stream, &prepass,
                       plan.least_slope);
  if (!status.ok()) return status;
  fwd.summaries = {static_cast<const ptx::U32x4*>(prepass.tiles), prepass.used};
  fwd.key_norms = prepass.key_norms;
  fwd.prune_threshold = prepass.prune_threshold;
  fwd.tile_count = static_cast<int>(prepass.tile_count);
  fwd.pack = static_cast<int>(params.group());
  fwd.heads = fwd.heads_per_section = static_cast<int>(params.batch * params.heads_kv);
  fwd.out_aligned = rows_aligned(params.out, params.batch, params.seqlen_q, params.heads_q);
  fwd.row_tiles = static_cast<int>((decode_rows(params) + Traits::kBlockM - 1) / Traits::kBlockM);
  const int64_t tiles = int64_t{fwd.row_tiles} * fwd.heads;
  plan.splits = decode::splits_of(tiles, decode::most_tiles(params, Traits::kBlockN),
                                  int64_t{device.multiprocessors} * Traits::kBlocksPerSm);
  if (plan.splits == 1) return {};
  const int64_t parts = tiles * plan.splits * Traits::kBlockM;
  plan.sums = workspace.take<float>(parts * Traits::kHeadDim);
  plan.stats = workspace.take<ptx::F32x2>(parts);
  plan.tickets = workspace.take<uint32_t>(tiles);
  return workspace.counting() ? LaunchStatus{} : zero_words(plan.tickets, tiles, stream);
}

// Why a device or a grid cannot take the call; empty when they can.
template <class Traits>
std::string decode_error(const PrefixAttnParams& params, const DeviceInfo& device,
                         int shared_bytes) {
  if (device.max_shared_bytes < shared_bytes)
    return "prefix_attn: a block needs " + std::to_string(shared_bytes) +
           " bytes of shared memory; the device allows " + std::to_string(device.max_shared_bytes);
  const int64_t row_tiles = (decode_rows(params) + Traits::kBlockM - 1) / Traits::kBlockM;
  if (row_tiles * params.batch * params.heads_kv > kMaxFwdBlocks ||
      too_many_tiles(params, Traits::kBlockN))
    return "prefix_attn: more tiles than a grid holds";
  return {};
}

inline ptx::LaunchConfig decode_config(const tile::DecodePlan& plan, int threads, int shared_bytes,
                                       void* stream) {
  ptx::LaunchConfig config;
  config.name = "prefix_attn_decode";
  config.grid.x = static_cast<unsigned>(plan.fwd.row_tiles) * static_cast<unsigned>(plan.fwd.heads);
  config.grid.y = static_cast<unsigned>(plan.splits);
  config.threads = threads;
  config.shared_bytes = shared_bytes;
  config.stream = stream;
  return config;
}

}  // namespace internvl::cuda
