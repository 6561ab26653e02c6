// Plan and launch of the sm90 forward of prefix_attn; included by the rendered instances and by the
// emulator.
#pragma once

#include "cuda/attn_fwd_plan.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/sm90/prefix_attn_fwd.h"
#include "cuda/sm90/prefix_attn_fwd_kernel.cuh"

namespace internvl::sm90 {
namespace fwd {

// A [batch, seqlen, heads, head_dim] tensor, of which a copy moves `rows` rows of one panel. Heads
// or batch rows that share the same memory (stride 0) count as one.
template <class Tile>
ptx::TensorMapShape map_shape(const PrefixAttnParams& params, const View& view, int64_t seqlen,
                              int64_t heads, int rows) {
  ptx::TensorMapShape shape;
  shape.type =
      params.dtype == DType::kBFloat16 ? ptx::TensorMapType::kBf16 : ptx::TensorMapType::kFp16;
  const int64_t sizes[] = {params.head_dim, seqlen, view.stride_h == 0 ? 1 : heads,
                           view.stride_b == 0 ? 1 : params.batch};
  const int64_t strides[] = {view.stride_s, view.stride_h, view.stride_b};
  for (int i = 0; i < 4; ++i) shape.sizes[i] = sizes[i];
  for (int i = 0; i < 3; ++i) shape.byte_strides[i] = 2 * strides[i];
  shape.box[0] = Tile::kPanel;
  shape.box[1] = rows;
  shape.swizzle = Tile::kSwizzle;
  return shape;
}

template <class Traits>
ptx::TensorMapShape key_map_shape(const PrefixAttnParams& params, const View& view) {
  return map_shape<typename Traits::KvTile>(params, view, params.seqlen_k, params.heads_kv,
                                            Traits::kBlockN);
}

template <class Traits>
LaunchStatus encode_keys(const PrefixAttnParams& params, const View& view, HeadMap* result) {
  result->head_step = view.stride_h != 0;
  result->batch_step = view.stride_b != 0;
  return ptx::encode_tensor_map(view.data, key_map_shape<Traits>(params, view), &result->map);
}

// Copies K and V into the workspace where no tensor map describes them (plan_fwd copies those whose
// rows are not aligned).
template <class Traits>
LaunchStatus copy_unmapped(cuda::Workspace& workspace, PrefixAttnParams& params, void* stream) {
  LaunchStatus status;
  for (View* view : {&params.k, &params.v}) {
    const bool aligned = cuda::rows_aligned(*view, params.batch, params.seqlen_k, params.heads_kv);
    if (!status.ok() || !aligned ||
        ptx::tensor_map_error(view->data, key_map_shape<Traits>(params, *view)).empty())
      continue;
    status = cuda::pack_rows(workspace, view, params.batch, params.seqlen_k, params.heads_kv,
                             params.head_dim, stream);
  }
  return status;
}

// Launches nothing while the workspace only counts.
template <class Traits>
LaunchStatus prepare(cuda::Workspace& workspace, FwdPlan& plan, void* stream) {
  LaunchStatus status;
  if (plan.params.seqlen_k > 0) status = copy_unmapped<Traits>(workspace, plan.params, stream);
  return status.ok() ? cuda::plan_fwd<Traits>(workspace, plan, stream) : status;
}

template <class Traits>
LaunchStatus encode_maps(FwdPlan& plan) {
  const PrefixAttnParams& params = plan.params;
  LaunchStatus status;
  if (params.seqlen_k > 0) {
    status = encode_keys<Traits>(params, params.k, &plan.k);
    if (status.ok()) status = encode_keys<Traits>(params, params.v, &plan.v);
  }
  const auto shape =
      map_shape<typename Traits::QTile>(params, params.out, params.seqlen_q, params.heads_q, 64);
  plan.out_mapped = plan.pack == 1 && ptx::tensor_map_error(params.out.data, shape).empty();
  if (status.ok() && plan.out_mapped)
    status = ptx::encode_tensor_map(params.out.data, shape, &plan.out);
  return status;
}

// One block per multiprocessor, each with its share of the query tiles, where they cost what their
// place in the order says. Else one per tile: hardware deals them out as blocks become free.
template <class Traits>
unsigned blocks_of(const FwdPlan& plan, const DeviceInfo& device) {
  const PrefixAttnParams& params = plan.params;
  const auto tiles = static_cast<unsigned>(plan.row_tiles) * static_cast<unsigned>(plan.heads);
  const bool known =
      !params.key_range && !params.key_flags && !params.segment_ids && plan.key_norms == nullptr;
  if (Traits::kQTiles == 1 || !known) return tiles;
  return std::min(tiles, static_cast<unsigned>(device.multiprocessors));
}

}  // namespace fwd

template <class T, int kHeadDim>
int64_t prefix_attn_fwd_workspace_bytes(const PrefixAttnParams& params, const DeviceInfo&) {
  cuda::Workspace workspace;
  FwdPlan plan;
  plan.params = params;
  fwd::prepare<PrefixAttnFwdTraits<T, kHeadDim>>(workspace, plan, nullptr);
  return workspace.bytes();
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_fwd(const PrefixAttnParams& params, const DeviceInfo& device, void* memory,
                             void* stream) {
  using Traits = PrefixAttnFwdTraits<T, kHeadDim>;
  constexpr int kSharedBytes = sizeof(FwdShared<Traits>);
  static_assert(kSharedBytes <= 227 * 1024, "what a block of compute capability 9.0 may have");
  if (device.max_shared_bytes < kSharedBytes)
    return {"prefix_attn: a block needs " + std::to_string(kSharedBytes) +
            " bytes of shared memory; the device allows " +
            std::to_string(device.max_shared_bytes)};
  if (cuda::fwd_too_large<Traits>(params)) return {"prefix_attn: more tiles than a grid holds"};
  cuda::Workspace workspace(memory);
  FwdPlan plan;
  plan.params = params;
  LaunchStatus status = fwd::prepare<Traits>(workspace, plan, stream);
  if (status.ok()) status = fwd::encode_maps<Traits>(plan);
  if (!status.ok()) return status;
  ptx::LaunchConfig config;
  config.name = "prefix_attn_fwd";
  config.grid.x = fwd::blocks_of<Traits>(plan, device);
  config.threads = Traits::kThreads;
  config.shared_bytes = kSharedBytes;
  config.stream = stream;
  return ptx::launch(prefix_attn_fwd_kernel<Traits>, config, plan);
}

}  // namespace internvl::sm90
