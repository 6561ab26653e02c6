#include "common/check.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

namespace internvl {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kAttn = "prefix_attn";
constexpr const char* kNorm = "clip_qk_layernorm";

// std::invalid_argument reaches Python as ValueError.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

std::string list_text(std::initializer_list<int64_t> sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  std::ostringstream text;
  text << (tensor.is_cuda() ? "cuda:" : "device ") << static_cast<int>(tensor.get_device_index());
  return text.str();
}

std::string dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

DType element_type(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, name, " has dtype ", dtype_text(tensor.scalar_type()),
           "; allowed: Float, BFloat16, Half");
  }
}

void check_same_device(const char* op, const char* name, const Tensor& tensor,
                       const char* like_name, const Tensor& like) {
  if (tensor.device() != like.device())
    fail(op, name, " is on ", device_text(tensor), "; ", like_name, " is on ", device_text(like));
}

void check_contiguous_last(const char* op, const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.numel() > 0 && tensor.size(last) > 1 && tensor.stride(last) != 1)
    fail(op, name, " has stride ", tensor.stride(last),
         " in its last dimension; allowed: 1 (call .contiguous())");
}

void check_heads_tensor(const char* name, const Tensor& tensor) {
  if (tensor.dim() != 4)
    fail(kAttn, name, " has shape ", shape_text(tensor),
         "; expected [batch, seqlen, heads, head_dim]");
  check_contiguous_last(kAttn, name, tensor);
}

// A small tensor of the mask: exact shape, dtype and device; contiguous afterwards. Null stays
// null.
template <class T>
const T* mask_data(const char* name, OptionalTensor& tensor, const Tensor& q, ScalarType dtype,
                   std::initializer_list<int64_t> shape, const char* shape_names) {
  if (!tensor) return nullptr;
  bool same = tensor->dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same = same && tensor->size(d++) == size;
  if (!same)
    fail(kAttn, name, " has shape ", shape_text(*tensor), "; expected ", shape_names, " = ",
         list_text(shape));
  if (tensor->scalar_type() != dtype)
    fail(kAttn, name, " has dtype ", dtype_text(tensor->scalar_type()),
         "; allowed: ", dtype_text(dtype));
  check_same_device(kAttn, name, *tensor, "q", q);
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
  return static_cast<const T*>(tensor->const_data_ptr());
}

void check_exclusive(const OptionalTensor& flags, const char* name, const OptionalTensor& other) {
  if (flags && other)
    fail(kAttn, "key_flags and ", name, " were both given; key_flags replaces ", name);
}

// INTERNVL_ALIBI_PRUNE, read at every call; variables.py reads it in the same way.
bool alibi_prune_wanted() {
  const char* value = std::getenv("INTERNVL_ALIBI_PRUNE");
  const std::string text = value ? value : "";
  if (text != "" && text != "0" && text != "1")
    fail(kAttn, "INTERNVL_ALIBI_PRUNE is '", text, "'; allowed: 0 (off), 1 (on, the default)");
  return text != "0";
}

// Equally spaced rows [..., width] with a contiguous last dimension: the row stride, or -1 when
// they are not.
int64_t row_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  int64_t stride = tensor.size(last);  // of a single row: any will do
  int64_t expected = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;  // its stride says nothing
    if (expected < 0)
      stride = tensor.stride(d);
    else if (tensor.stride(d) != expected)
      return -1;
    expected = tensor.stride(d) * tensor.size(d);
  }
  return stride;
}

const void* parameter_data(const char* name, OptionalTensor& tensor, const Tensor& qkv,
                           int64_t width, DType* dtype, const char** first) {
  if (!tensor) return nullptr;
  if (tensor->dim() != 1 || tensor->size(0) != width)
    fail(kNorm, name, " has shape ", shape_text(*tensor), "; expected [", width, "]");
  if (tensor->scalar_type() != ScalarType::Float && tensor->scalar_type() != qkv.scalar_type())
    fail(kNorm, name, " has dtype ", dtype_text(tensor->scalar_type()),
         "; allowed: Float or qkv's ", dtype_text(qkv.scalar_type()));
  const DType own = element_type(kNorm, name, *tensor);
  if (*first && own != *dtype)
    fail(kNorm, name, " has dtype ", dtype_text(tensor->scalar_type()), "; expected the dtype of ",
         *first);
  *first = name;
  *dtype = own;
  check_same_device(kNorm, name, *tensor, "qkv", qkv);
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
  return tensor->const_data_ptr();
}

}  // namespace

View view_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

PrefixAttnParams check_prefix_attn(PrefixAttnTensors& tensors, std::optional<double> softmax_scale,
                                   int64_t window) {
  const Tensor &q = tensors.q, &k = tensors.k, &v = tensors.v;
  check_heads_tensor("q", q);
  check_heads_tensor("k", k);
  check_heads_tensor("v", v);
  PrefixAttnParams params;
  params.dtype = element_type(kAttn, "q", q);
  params.batch = q.size(0);
  params.seqlen_q = q.size(1);
  params.heads_q = q.size(2);
  params.head_dim = q.size(3);
  params.seqlen_k = k.size(1);
  params.heads_kv = k.size(2);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    if (tensor.scalar_type() != q.scalar_type())
      fail(kAttn, name, " has dtype ", dtype_text(tensor.scalar_type()), "; expected q's ",
           dtype_text(q.scalar_type()));
    check_same_device(kAttn, name, tensor, "q", q);
    if (tensor.size(0) != params.batch || tensor.size(1) != params.seqlen_k ||
        tensor.size(2) != params.heads_kv || tensor.size(3) != params.head_dim)
      fail(kAttn, name, " has shape ", shape_text(tensor), "; expected [", params.batch, ", ",
           params.seqlen_k, ", ", params.heads_kv, ", ", params.head_dim, "] (q has shape ",
           shape_text(q), ")");
  }
  if (params.head_dim < 1 || params.head_dim > kMaxHeadDim)
    fail(kAttn, "q has head_dim ", params.head_dim, "; allowed: 1 to ", kMaxHeadDim);
  if (params.heads_kv < 1 || params.heads_q < 1 || params.heads_q % params.heads_kv != 0)
    fail(kAttn, "q has ", params.heads_q, " heads and k has ", params.heads_kv,
         "; the number of query heads must be a multiple of the number of KV heads");
  if (params.seqlen_k > kMaxSeqlen)
    fail(kAttn, "k has ", params.seqlen_k, " keys; allowed: at most ", kMaxSeqlen);
  if (params.seqlen_q > kMaxSeqlen)
    fail(kAttn, "q has ", params.seqlen_q, " rows; allowed: at most ", kMaxSeqlen);
  const double scale =
      softmax_scale ? *softmax_scale : 1.0 / std::sqrt(static_cast<double>(params.head_dim));
  params.softmax_scale = static_cast<float>(scale);
  if (!std::isfinite(params.softmax_scale))
    fail(kAttn, "softmax_scale is ", scale, "; allowed: finite fp32 numbers");
  if (window < 0 || window > kMaxSeqlen)
    fail(kAttn, "window is ", window, "; allowed: 0 (none) to ", kMaxSeqlen);
  params.window = window;

  check_exclusive(tensors.key_flags, "prefix_len", tensors.prefix_len);
  check_exclusive(tensors.key_flags, "key_range", tensors.key_range);
  const int64_t batch = params.batch, seqlen_k = params.seqlen_k;
  params.prefix_len =
      mask_data<int32_t>("prefix_len", tensors.prefix_len, q, ScalarType::Int, {batch}, "[batch]");
  params.key_range = mask_data<int32_t>("key_range", tensors.key_range, q, ScalarType::Int,
                                        {batch, 2}, "[batch, 2]");
  params.query_start = mask_data<int32_t>("query_start", tensors.query_start, q, ScalarType::Int,
                                          {batch}, "[batch]");
  params.key_flags = mask_data<uint8_t>("key_flags", tensors.key_flags, q, ScalarType::Byte,
                                        {batch, seqlen_k}, "[batch, seqlen_k]");
  params.segment_ids = mask_data<int32_t>("segment_ids", tensors.segment_ids, q, ScalarType::Int,
                                          {batch, seqlen_k}, "[batch, seqlen_k]");
  params.alibi_slopes = mask_data<float>("alibi_slopes", tensors.alibi_slopes, q, ScalarType::Float,
                                         {params.heads_q}, "[heads_q]");
  params.alibi_prune = params.alibi_slopes != nullptr && alibi_prune_wanted();
  params.q = view_of(q);
  params.k = view_of(k);
  params.v = view_of(v);
  return params;
}

void check_key_range_values(const PrefixAttnParams& params) {
  if (!params.key_range) return;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int32_t start = params.key_range[2 * b], end = params.key_range[2 * b + 1];
    if (start < 0 || end < start)
      fail(kAttn, "key_range[", b, "] is [", start, ", ", end, "); allowed: 0 <= start <= end");
  }
}

View check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  bool same = tensor.dim() == like.dim();
  for (int64_t d = 0; same && d < like.dim(); ++d) same = tensor.size(d) == like.size(d);
  if (!same) fail(op, name, " has shape ", shape_text(tensor), "; expected ", shape_text(like));
  if (tensor.scalar_type() != like.scalar_type())
    fail(op, name, " has dtype ", dtype_text(tensor.scalar_type()), "; expected ",
         dtype_text(like.scalar_type()));
  check_same_device(op, name, tensor, "q", like);
  check_contiguous_last(op, name, tensor);
  return view_of(tensor);
}

Tensor check_lse(const char* op, const char* name, const Tensor& tensor, const Tensor& q) {
  if (tensor.dim() != 3 || tensor.size(0) != q.size(0) || tensor.size(1) != q.size(2) ||
      tensor.size(2) != q.size(1))
    fail(op, name, " has shape ", shape_text(tensor), "; expected [batch, heads_q, seqlen_q] = [",
         q.size(0), ", ", q.size(2), ", ", q.size(1), "]");
  if (tensor.scalar_type() != ScalarType::Float)
    fail(op, name, " has dtype ", dtype_text(tensor.scalar_type()), "; allowed: Float");
  check_same_device(op, name, tensor, "q", q);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

ClipQkLayernormParams check_clip_qk_layernorm(ClipQkLayernormTensors& tensors, int64_t q_width,
                                              int64_t k_width, std::optional<double> clip,
                                              double eps) {
  Tensor& qkv = tensors.qkv;
  ClipQkLayernormParams params;
  params.dtype = element_type(kNorm, "qkv", qkv);
  if (q_width < 1 || k_width < 1)
    fail(kNorm, "q_width is ", q_width, " and k_width is ", k_width, "; allowed: positive widths");
  const int64_t last = qkv.dim() - 1;
  if (last < 0 || qkv.size(last) != q_width + 2 * k_width)
    fail(kNorm, "qkv has shape ", shape_text(qkv),
         "; expected [..., q_width + 2 * k_width] = [..., ", q_width + 2 * k_width, "]");
  check_contiguous_last(kNorm, "qkv", qkv);
  // Checked as the fp32 numbers the kernels use.
  params.has_clip = clip.has_value();
  params.clip = clip ? static_cast<float>(*clip) : 0.0f;
  params.eps = static_cast<float>(eps);
  if (clip && !(params.clip > 0.0f && std::isfinite(params.clip)))
    fail(kNorm, "clip is ", *clip, "; allowed: a positive finite fp32 number, or None for no clip");
  if (!(params.eps >= 0.0f && std::isfinite(params.eps)))
    fail(kNorm, "eps is ", eps, "; allowed: finite fp32 numbers >= 0");
  if (tensors.q_bias && !tensors.q_weight)
    fail(kNorm, "q_bias was given without q_weight; pass both or no bias");
  if (tensors.k_bias && !tensors.k_weight)
    fail(kNorm, "k_bias was given without k_weight; pass both or no bias");
  const char* first = nullptr;
  params.q_weight =
      parameter_data("q_weight", tensors.q_weight, qkv, q_width, &params.parameter_dtype, &first);
  params.q_bias =
      parameter_data("q_bias", tensors.q_bias, qkv, q_width, &params.parameter_dtype, &first);
  params.k_weight =
      parameter_data("k_weight", tensors.k_weight, qkv, k_width, &params.parameter_dtype, &first);
  params.k_bias =
      parameter_data("k_bias", tensors.k_bias, qkv, k_width, &params.parameter_dtype, &first);
  if (row_stride(qkv) < 0) qkv = torch::stable::contiguous(qkv);
  params.qkv_stride = row_stride(qkv);
  params.rows = qkv.numel() / (q_width + 2 * k_width);
  params.q_width = q_width;
  params.k_width = k_width;
  params.qkv = qkv.const_data_ptr();
  return params;
}

const void* check_gradient_rows(const char* name, OptionalTensor& grad, const Tensor& qkv,
                                int64_t width, int64_t* stride) {
  constexpr const char* kOp = "clip_qk_layernorm_backward";
  if (!grad) return nullptr;
  const int64_t last = qkv.dim() - 1;
  bool same = grad->dim() == qkv.dim() && grad->size(last) == width;
  for (int64_t d = 0; same && d < last; ++d) same = grad->size(d) == qkv.size(d);
  if (!same)
    fail(kOp, name, " has shape ", shape_text(*grad),
         "; expected qkv's shape with a last dimension of ", width);
  if (grad->scalar_type() != qkv.scalar_type())
    fail(kOp, name, " has dtype ", dtype_text(grad->scalar_type()), "; expected ",
         dtype_text(qkv.scalar_type()));
  check_same_device(kOp, name, *grad, "qkv", qkv);
  check_contiguous_last(kOp, name, *grad);
  if (row_stride(*grad) < 0) grad = torch::stable::contiguous(*grad);
  *stride = row_stride(*grad);
  return grad->const_data_ptr();
}

Tensor check_statistics(const Tensor& statistics, const Tensor& qkv, int64_t rows) {
  constexpr const char* kOp = "clip_qk_layernorm_backward";
  if (statistics.scalar_type() != ScalarType::Float || statistics.numel() != 4 * rows)
    fail(kOp, "statistics has shape ", shape_text(statistics), " and dtype ",
         dtype_text(statistics.scalar_type()),
         "; expected the Float statistics of the forward, 4 per row of qkv");
  check_same_device(kOp, "statistics", statistics, "qkv", qkv);
  return statistics.is_contiguous() ? statistics : torch::stable::contiguous(statistics);
}

}  // namespace internvl
