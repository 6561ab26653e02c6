// Tensor maps of what a forward streams; Traits has KvTile and kBlockN.
#pragma once

#include "cuda/prepass.h"
#include "cuda/sm90/fwd_operands.cuh"

namespace internvl::sm90 {

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

// The maps of K and V.
template <class Traits>
LaunchStatus encode_keys(const PrefixAttnParams& params, HeadMap* k, HeadMap* v) {
  const auto encode = [&](const View& view, HeadMap* result) {
    result->head_step = view.stride_h != 0;
    result->batch_step = view.stride_b != 0;
    return ptx::encode_tensor_map(view.data, key_map_shape<Traits>(params, view), &result->map);
  };
  const LaunchStatus status = encode(params.k, k);
  return status.ok() ? encode(params.v, v) : status;
}

// Copies K and V into the workspace where no tensor map describes them (align_inputs copies those
// whose rows are not aligned).
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

}  // namespace internvl::sm90
