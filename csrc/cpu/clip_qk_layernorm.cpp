// CPU registration of clip_qk_layernorm: check, split the rows, run them on the ISA's kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/check.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace internvl::cpu {
namespace {

using torch::headeronly::ScalarType;

// A fixed number of row chunks, whatever the thread count: parameter gradients are summed chunk by
// chunk.
constexpr int64_t kChunks = 32;
constexpr double kFlopsPerElement = 8.0;

struct Chunks {
  int64_t rows, count;
  explicit Chunks(int64_t n)
      : rows(std::max<int64_t>((n + kChunks - 1) / kChunks, 1)), count((n + rows - 1) / rows) {}
};

double work(const ClipQkLayernormParams& params) {
  return kFlopsPerElement * static_cast<double>(params.rows) * static_cast<double>(params.width());
}

Tensor rows_like(const Tensor& qkv, int64_t width, std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < qkv.dim(); ++d) shape.push_back(qkv.size(d));
  shape.push_back(width);
  return torch::stable::new_empty(qkv, {shape.data(), shape.size()}, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm(
    Tensor qkv, int64_t q_width, int64_t k_width, std::optional<double> clip,
    OptionalTensor q_weight, OptionalTensor q_bias, OptionalTensor k_weight, OptionalTensor k_bias,
    double eps) {
  ClipQkLayernormTensors tensors{qkv, q_weight, q_bias, k_weight, k_bias};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, eps);
  Tensor q = rows_like(qkv, q_width), k = rows_like(qkv, k_width), v = rows_like(qkv, k_width);
  Tensor statistics = rows_like(qkv, 4, ScalarType::Float);
  params.q = q.mutable_data_ptr();
  params.k = k.mutable_data_ptr();
  params.v = v.mutable_data_ptr();
  params.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  const Chunks chunks(params.rows);
  run_tasks(chunks.count, 0, work(params), [&](int64_t chunk, float*) {
    const int64_t begin = chunk * chunks.rows;
    kernels().clip_qk_layernorm[static_cast<int>(params.dtype)](
        params, begin, std::min(begin + chunks.rows, params.rows));
  });
  return {q, k, v, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm_backward(
    OptionalTensor grad_q, OptionalTensor grad_k, OptionalTensor grad_v, Tensor qkv,
    int64_t q_width, int64_t k_width, std::optional<double> clip, OptionalTensor q_weight,
    OptionalTensor k_weight, Tensor statistics) {
  ClipQkLayernormTensors tensors{qkv, q_weight, std::nullopt, k_weight, std::nullopt};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, 0.0);
  statistics = check_statistics(statistics, qkv, params.rows);
  params.statistics = static_cast<float*>(const_cast<void*>(statistics.const_data_ptr()));
  ClipQkLayernormGrads grads;
  grads.grad_q = check_gradient_rows("grad_q", grad_q, qkv, q_width, &grads.grad_q_stride);
  grads.grad_k = check_gradient_rows("grad_k", grad_k, qkv, k_width, &grads.grad_k_stride);
  grads.grad_v = check_gradient_rows("grad_v", grad_v, qkv, k_width, &grads.grad_v_stride);
  Tensor grad_qkv = rows_like(qkv, params.width());
  grads.grad_qkv = grad_qkv.mutable_data_ptr();

  const Kernels& isa = kernels();
  const auto padded = [&](int64_t width) {
    return (width + isa.lanes - 1) / isa.lanes * isa.lanes;
  };
  const int64_t sums = 2 * padded(q_width) + 2 * padded(k_width);
  const Chunks chunks(params.rows);
  std::vector<float> parts(chunks.count * sums, 0.0f);
  run_tasks(chunks.count, 0, 2 * work(params), [&](int64_t chunk, float*) {
    const int64_t begin = chunk * chunks.rows;
    isa.clip_qk_layernorm_backward[static_cast<int>(params.dtype)](
        params, grads, begin, std::min(begin + chunks.rows, params.rows),
        parts.data() + chunk * sums);
  });

  const auto collect = [&](bool present, int64_t width, int64_t offset) {
    Tensor total = torch::stable::new_empty(qkv, {present ? width : 0}, ScalarType::Float);
    float* out = static_cast<float*>(total.mutable_data_ptr());
    for (int64_t d = 0; present && d < width; ++d) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
        sum += parts[chunk * sums + offset + d];
      out[d] = static_cast<float>(sum);
    }
    return total;
  };
  const int64_t k_offset = 2 * padded(q_width);
  return {grad_qkv, collect(q_weight.has_value(), q_width, 0),
          collect(q_weight.has_value(), q_width, padded(q_width)),
          collect(k_weight.has_value(), k_width, k_offset),
          collect(k_weight.has_value(), k_width, k_offset + padded(k_width))};
}

}  // namespace
}  // namespace internvl::cpu

STABLE_TORCH_LIBRARY_IMPL(internvl, CPU, m) {
  m.impl("clip_qk_layernorm", TORCH_BOX(&internvl::cpu::clip_qk_layernorm));
  m.impl("clip_qk_layernorm_backward", TORCH_BOX(&internvl::cpu::clip_qk_layernorm_backward));
}
