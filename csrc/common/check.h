// The one place that turns tensors into kernel parameters, or into an error: argument, value found,
// what is allowed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/params.h"

namespace internvl {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The tensors of a prefix_attn call; the mask tensors as given.
struct PrefixAttnTensors {
  Tensor q, k, v;
  OptionalTensor prefix_len, key_range, query_start, key_flags, segment_ids, alibi_slopes;
};

// Checks everything but the memory of the mask tensors and fills all of `params` except out and
// lse. The mask tensors of `tensors` are replaced by contiguous ones, which must outlive `params`.
// Throws std::invalid_argument (ValueError).
PrefixAttnParams check_prefix_attn(PrefixAttnTensors& tensors, std::optional<double> softmax_scale,
                                   int64_t window);

// Host memory only: key_range must not be negative or decreasing. Device data is never read;
// kernels clamp it.
void check_key_range_values(const PrefixAttnParams& params);

// A [batch, seqlen, heads, head_dim] argument of the backward that must match `like` (shape) and
// the inputs' dtype.
View check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like);

// lse or its gradient: [batch, heads_q, seqlen_q] fp32 on q's device; returned contiguous.
Tensor check_lse(const char* op, const char* name, const Tensor& tensor, const Tensor& q);

struct ClipQkLayernormTensors {
  Tensor qkv;
  OptionalTensor q_weight, q_bias, k_weight, k_bias;
};

// Rows of qkv must be equally spaced; `tensors.qkv` is made contiguous when they are not.
ClipQkLayernormParams check_clip_qk_layernorm(ClipQkLayernormTensors& tensors, int64_t q_width,
                                              int64_t k_width, std::optional<double> clip,
                                              double eps);

// A gradient [..., width] of the backward: equally spaced rows of qkv's dtype; made contiguous when
// they are not.
const void* check_gradient_rows(const char* name, OptionalTensor& grad, const Tensor& qkv,
                                int64_t width, int64_t* stride);

// Saved statistics [..., 4] fp32 of `rows` rows; returned contiguous.
Tensor check_statistics(const Tensor& statistics, const Tensor& qkv, int64_t rows);

View view_of(const Tensor& tensor);

}  // namespace internvl
