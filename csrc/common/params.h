// What a kernel needs to know about one call, free of PyTorch: filled once by check.cpp, read
// everywhere below.
#pragma once

#include <cstdint>

namespace internvl {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxSeqlen = int64_t{1}
                               << 30;  // positions fit int32 with room for window arithmetic

// [batch, seqlen, heads, head_dim] with a contiguous last dimension; strides in elements.
struct View {
  void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_s = 0;
  int64_t stride_h = 0;
};

struct PrefixAttnParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;
  int64_t head_dim = 0;
  float softmax_scale = 0.0f;
  int64_t window = 0;  // in keys, 0 = none

  View q, k, v, out;
  float* lse = nullptr;  // [batch, heads_q, seqlen_q], contiguous

  const int32_t* prefix_len = nullptr;   // [batch]
  const int32_t* key_range = nullptr;    // [batch, 2]
  const int32_t* query_start = nullptr;  // [batch]
  const uint8_t* key_flags = nullptr;    // [batch, seqlen_k], replaces prefix_len and key_range
  const int32_t* segment_ids = nullptr;  // [batch, seqlen_k]
  const float* alibi_slopes = nullptr;   // [heads_q]
  bool alibi_prune = false;              // skip far key tiles (prune.h); false without slopes

  int64_t group() const { return heads_q / heads_kv; }
};

struct PrefixAttnGrads {
  View grad_out;
  const float* grad_lse = nullptr;  // [batch, heads_q, seqlen_q], contiguous, or null
  View dq, dk, dv;
  float* dalibi_slopes = nullptr;  // [heads_q], or null without slopes
};

// Rows of the fused projection; all row strides in elements.
struct ClipQkLayernormParams {
  DType dtype = DType::kFloat32;
  DType parameter_dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t q_width = 0;
  int64_t k_width = 0;
  int64_t qkv_stride = 0;
  float clip = 0.0f;  // read only when has_clip
  bool has_clip = false;
  float eps = 0.0f;
  const void* qkv = nullptr;  // [rows, q_width + 2 * k_width]
  const void* q_weight = nullptr;
  const void* q_bias = nullptr;
  const void* k_weight = nullptr;
  const void* k_bias = nullptr;
  void* q = nullptr;  // [rows, q_width], contiguous, likewise k and v
  void* k = nullptr;
  void* v = nullptr;
  float* statistics = nullptr;  // [rows, 4]: q mean, q 1/std, k mean, k 1/std

  int64_t width() const { return q_width + 2 * k_width; }
};

struct ClipQkLayernormGrads {
  const void* grad_q = nullptr;  // null: zero
  const void* grad_k = nullptr;
  const void* grad_v = nullptr;
  int64_t grad_q_stride = 0;
  int64_t grad_k_stride = 0;
  int64_t grad_v_stride = 0;
  void* grad_qkv = nullptr;    // [rows, width], contiguous
  float* dq_weight = nullptr;  // null without that norm
  float* dq_bias = nullptr;
  float* dk_weight = nullptr;
  float* dk_bias = nullptr;
};

}  // namespace internvl
