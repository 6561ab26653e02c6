// Plan and launches of the Hopper backward of prefix_attn; included by the rendered instances and
// by the emulator.
#pragma once

#include "cuda/sm90/prefix_attn_bwd.h"
#include "cuda/sm90/prefix_attn_bwd_kv_kernel.cuh"
#include "cuda/sm90/prefix_attn_bwd_q_kernel.cuh"
#include "cuda/tile/attn_grad_launch.cuh"

namespace internvl::sm90 {
namespace bwd {

// A tensor that the kernels stream, and where its map goes.
struct Streamed {
  View* view;
  int64_t seqlen, heads;
  ptx::TensorMap* map;
};

template <class Traits>
ptx::TensorMapShape map_shape(const PrefixAttnParams& params, const Streamed& tensor) {
  using Panels = tile::PanelTile<kBoxRows, Traits::kHeadDim>;
  ptx::TensorMapShape shape;
  shape.type = std::is_same_v<typename Traits::Element, ptx::Bf16> ? ptx::TensorMapType::kBf16
                                                                   : ptx::TensorMapType::kFp16;
  shape.swizzle = Panels::kSwizzle;
  const int64_t sizes[4] = {params.head_dim, tensor.seqlen, tensor.heads, params.batch};
  const int64_t strides[3] = {tensor.view->stride_s, tensor.view->stride_h, tensor.view->stride_b};
  for (int i = 0; i < 4; ++i) shape.sizes[i] = sizes[i];
  for (int i = 0; i < 3; ++i) shape.byte_strides[i] = strides[i] * 2;
  shape.box[0] = Panels::kPanel;
  shape.box[1] = kBoxRows;
  return shape;
}

// The plan of a call, and its working memory; launches what comes before the kernels unless the
// workspace only counts. Tensors that a map cannot describe are copied to ones that it can.
template <class Traits>
LaunchStatus prepare(cuda::Workspace& workspace, BwdPlan& plan, void* stream) {
  PrefixAttnParams& params = plan.args.params;
  const Streamed streamed[] = {
      {&params.q, params.seqlen_q, params.heads_q, &plan.q},
      {&params.k, params.seqlen_k, params.heads_kv, &plan.k},
      {&params.v, params.seqlen_k, params.heads_kv, &plan.v},
      {&plan.args.grads.grad_out, params.seqlen_q, params.heads_q, &plan.grad_out}};
  for (const Streamed& tensor : streamed) {
    if (params.batch * tensor.seqlen * tensor.heads == 0) continue;  // nobody reads it
    const auto shape = [&] { return map_shape<Traits>(params, tensor); };
    LaunchStatus status;
    if (!ptx::tensor_map_error(tensor.view->data, shape()).empty())
      status = cuda::pack_rows(workspace, tensor.view, params.batch, tensor.seqlen, tensor.heads,
                               params.head_dim, stream);
    if (workspace.counting()) *tensor.view = {};  // counted: no second copy to align it
    if (status.ok() && !workspace.counting())
      status = ptx::encode_tensor_map(tensor.view->data, shape(), tensor.map);
    if (!status.ok()) return status;
  }
  return tile::bwd_prepare<Traits>(workspace, plan.args, stream);
}

}  // namespace bwd

template <class T, int kHeadDim>
int64_t prefix_attn_bwd_workspace_bytes(const PrefixAttnParams& params,
                                        const PrefixAttnGrads& grads, const DeviceInfo&) {
  cuda::Workspace workspace;
  BwdPlan plan = {};
  plan.args.params = params;
  plan.args.grads = grads;
  bwd::prepare<BwdTraits<T, kHeadDim>>(workspace, plan, nullptr);
  return workspace.bytes();
}

template <class T, int kHeadDim>
LaunchStatus prefix_attn_bwd(const PrefixAttnParams& params, const PrefixAttnGrads& grads,
                             const DeviceInfo&, void* memory, void* stream) {
  using Traits = BwdTraits<T, kHeadDim>;
  constexpr size_t kKvBytes = sizeof(BwdKvShared<Traits>), kQBytes = sizeof(BwdQShared<Traits>);
  static_assert(kKvBytes <= kMaxSharedBytes && kQBytes <= kMaxSharedBytes,
                "what a block of compute capability 9.0 can have");
  const std::string error = tile::bwd_size_error<Traits>(params);
  if (!error.empty()) return {error};

  cuda::Workspace workspace(memory);
  BwdPlan plan = {};
  plan.args.params = params;
  plan.args.grads = grads;
  const int64_t kv_blocks =
      tile::tiles_of(params.seqlen_k, Traits::kBlockN) * params.batch * params.heads_kv;
  const int64_t q_blocks =
      tile::tiles_of(params.seqlen_q, Traits::kBlockRows) * params.batch * params.heads_q;
  LaunchStatus status = bwd::prepare<Traits>(workspace, plan, stream);
  if (status.ok()) status = tile::bwd_launch_rows<Traits>(plan.args, stream);
  if (status.ok())
    status = ptx::launch(
        prefix_attn_bwd_kv_kernel<Traits>,
        tile::bwd_config("prefix_attn_bwd_kv", kv_blocks, kThreads, kKvBytes, stream), plan);
  if (status.ok())
    status = ptx::launch(prefix_attn_bwd_q_kernel<Traits>,
                         tile::bwd_config("prefix_attn_bwd_q", q_blocks, kThreads, kQBytes, stream),
                         plan);
  return status.ok() ? tile::bwd_launch_slopes<Traits>(plan.args, stream) : status;
}

}  // namespace internvl::sm90
