#include "common/prune.h"
#include "cuda/prepass.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/tile/key_norms.cuh"
#include "cuda/tile/key_summary.cuh"
#include "cuda/tile/pack_rows.cuh"
#include "cuda/tile/zero_words.cuh"

namespace internvl::cuda {
namespace {

constexpr int kMinTilesToPrune = 8;  // below, reading the keys for their norms costs more

ptx::LaunchConfig config_of(const char* name, int64_t blocks, int threads, int shared_bytes,
                            void* stream) {
  ptx::LaunchConfig config;
  config.name = name;
  config.grid.x = static_cast<unsigned>(blocks);
  config.threads = threads;
  config.shared_bytes = shared_bytes;
  config.stream = stream;
  return config;
}

}  // namespace

bool needs_key_summary(const PrefixAttnParams& params) {
  return params.key_flags != nullptr || params.segment_ids != nullptr;
}

bool may_prune(const PrefixAttnParams& params, int block_n) {
  return params.alibi_prune && params.alibi_slopes != nullptr &&
         params.seqlen_k >= int64_t{kMinTilesToPrune} * block_n;
}

bool rows_aligned(const View& view, int64_t batch, int64_t seqlen, int64_t heads) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         (batch <= 1 || view.stride_b % 8 == 0) && (seqlen <= 1 || view.stride_s % 8 == 0) &&
         (heads <= 1 || view.stride_h % 8 == 0);
}

LaunchStatus pack_rows(Workspace& workspace, View* view, int64_t batch, int64_t seqlen,
                       int64_t heads, int64_t head_dim, void* stream) {
  tile::PackRowsPlan plan;
  plan.batch = batch;
  plan.seqlen = seqlen;
  plan.heads = heads;
  plan.head_dim = head_dim;
  const int64_t width = plan.chunks_per_row() * 8;
  plan.from = *view;
  plan.to = {workspace.take<uint16_t>(batch * seqlen * heads * width), seqlen * heads * width,
             heads * width, width};
  if (workspace.counting()) return {};
  *view = plan.to;
  const int64_t chunks = batch * seqlen * heads * plan.chunks_per_row();
  return ptx::launch(tile::pack_rows_kernel<tile::kPackThreads>,
                     config_of("pack_rows", (chunks + tile::kPackThreads - 1) / tile::kPackThreads,
                               tile::kPackThreads, 0, stream),
                     plan);
}

LaunchStatus align_rows(Workspace& workspace, View* view, int64_t batch, int64_t seqlen,
                        int64_t heads, int64_t head_dim, void* stream) {
  if (rows_aligned(*view, batch, seqlen, heads)) return {};
  return pack_rows(workspace, view, batch, seqlen, heads, head_dim, stream);
}

LaunchStatus align_inputs(Workspace& workspace, PrefixAttnParams* params, void* stream) {
  const PrefixAttnParams& p = *params;
  LaunchStatus status =
      align_rows(workspace, &params->q, p.batch, p.seqlen_q, p.heads_q, p.head_dim, stream);
  for (View* view : {&params->k, &params->v})
    if (status.ok())
      status = align_rows(workspace, view, p.batch, p.seqlen_k, p.heads_kv, p.head_dim, stream);
  return status;
}

bool too_many_tiles(const PrefixAttnParams& params, int block_n) {
  return (params.seqlen_k + block_n - 1) / block_n * params.batch * params.heads_kv > 0x7fffffff;
}

LaunchStatus run_prepass(Workspace& workspace, const PrefixAttnParams& params, int block_n,
                         bool prune, void* stream, Prepass* result, float least_slope) {
  *result = {};
  result->block_n = block_n;
  result->tile_count = (params.seqlen_k + block_n - 1) / block_n;
  const int64_t tiles = params.batch * result->tile_count;
  tile::KeySummaries summaries;
  if (needs_key_summary(params)) {
    tile::KeySummaryPlan plan;
    plan.params = params;
    plan.block_n = block_n;
    plan.tile_count = result->tile_count;
    plan.tiles = workspace.take<ptx::U32x4>(tiles);
    plan.used = workspace.take<uint8_t>(params.batch * params.seqlen_k);
    summaries = {plan.tiles, plan.used};
    result->tiles = plan.tiles;
    result->used = plan.used;
    if (!workspace.counting()) {
      const LaunchStatus status = ptx::launch(tile::key_summary_kernel<tile::kSummaryThreads>,
                                              config_of("key_summary", tiles, tile::kSummaryThreads,
                                                        tile::kSummaryThreads / 32 * 8, stream),
                                              plan);
      if (!status.ok()) return status;
    }
  }
  if (!prune) return {};
  tile::KeyNormPlan plan;
  plan.params = params;
  plan.summaries = summaries;
  plan.block_n = block_n;
  plan.tile_count = result->tile_count;
  plan.least_slope = least_slope;
  plan.norms = workspace.take<float>(tiles * params.heads_kv);
  result->key_norms = plan.norms;
  result->prune_threshold = prune_threshold(params.dtype, params.seqlen_k);
  if (workspace.counting()) return {};
  return ptx::launch(params.dtype == DType::kBFloat16 ? tile::key_norm_kernel<ptx::Bf16>
                                                      : tile::key_norm_kernel<ptx::Fp16>,
                     config_of("key_norms", tiles * params.heads_kv, tile::kNormThreads,
                               tile::kNormThreads / 32 * 4, stream),
                     plan);
}

LaunchStatus zero_words(uint32_t* words, int64_t count, void* stream) {
  const int64_t blocks = (count + tile::kZeroThreads - 1) / tile::kZeroThreads;
  return ptx::launch(tile::zero_words_kernel<tile::kZeroThreads>,
                     config_of("zero_words", blocks, tile::kZeroThreads, 0, stream), words, count);
}

}  // namespace internvl::cuda
