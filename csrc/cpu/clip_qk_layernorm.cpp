// CPU registration of clip_qk_layernorm: check, split the rows, run them on the ISA's kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/outputs.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace internvl::cpu {
namespace {

// Row chunks, the same whatever the thread count: parameter gradients are summed chunk by chunk.
// Each converts the parameters for itself, which takes about as long as a row.
constexpr int64_t kChunks = 32, kMinRows = 8;
constexpr double kFlopsPerElement = 8.0;

struct Chunks {
  int64_t rows, count;
  explicit Chunks(int64_t n)
      : rows(std::max((n + kChunks - 1) / kChunks, kMinRows)), count((n + rows - 1) / rows) {}
};

// Floats of a row in the kernels' memory.
int64_t padded(int64_t width) {
  const int64_t two_vectors = 2 * kernels().lanes;
  return (width + two_vectors - 1) / two_vectors * two_vectors;
}

double work(const ClipQkLayernormParams& params) {
  return kFlopsPerElement * static_cast<double>(params.rows) * static_cast<double>(params.width());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm(
    Tensor qkv, int64_t q_width, int64_t k_width, std::optional<double> clip,
    OptionalTensor q_weight, OptionalTensor q_bias, OptionalTensor k_weight, OptionalTensor k_bias,
    double eps) {
  ClipQkLayernormTensors tensors{qkv, q_weight, q_bias, k_weight, k_bias};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, eps);
  const auto outputs = new_clip_qk_layernorm_outputs(qkv, &params);
  const Chunks chunks(params.rows);
  const int64_t q_padded = padded(q_width), k_padded = padded(k_width);
  const int64_t scratch_floats = 2 * q_padded + 2 * k_padded + std::max(q_padded, k_padded);
  run_tasks(chunks.count, scratch_floats, work(params), [&](int64_t chunk, float* scratch) {
    const int64_t begin = chunk * chunks.rows;
    kernels().clip_qk_layernorm[static_cast<int>(params.dtype)](
        params, begin, std::min(begin + chunks.rows, params.rows), scratch);
  });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_qk_layernorm_backward(
    OptionalTensor grad_q, OptionalTensor grad_k, OptionalTensor grad_v, Tensor qkv,
    int64_t q_width, int64_t k_width, std::optional<double> clip, OptionalTensor q_weight,
    OptionalTensor k_weight, Tensor statistics) {
  ClipQkLayernormTensors tensors{qkv, q_weight, std::nullopt, k_weight, std::nullopt};
  ClipQkLayernormParams params = check_clip_qk_layernorm(tensors, q_width, k_width, clip, 0.0);
  ClipQkLayernormBackwardCall call(tensors, grad_q, grad_k, grad_v, statistics, &params);

  const int64_t q_padded = padded(q_width), k_padded = padded(k_width);
  const int64_t sums = 2 * q_padded + 2 * k_padded;
  const int64_t scratch_floats = q_padded + k_padded + std::max(q_padded, k_padded);
  const Chunks chunks(params.rows);
  std::vector<float> parts(chunks.count * sums, 0.0f);
  run_tasks(chunks.count, scratch_floats, 2 * work(params), [&](int64_t chunk, float* scratch) {
    const int64_t begin = chunk * chunks.rows;
    kernels().clip_qk_layernorm_backward[static_cast<int>(params.dtype)](
        params, call.grads, begin, std::min(begin + chunks.rows, params.rows),
        parts.data() + chunk * sums, scratch);
  });

  const auto collect = [&](float* gradient, int64_t width, int64_t offset) {
    for (int64_t d = 0; gradient && d < width; ++d) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
        sum += parts[chunk * sums + offset + d];
      gradient[d] = static_cast<float>(sum);
    }
  };
  collect(call.grads.dq_weight, q_width, 0);
  collect(call.grads.dq_bias, q_width, q_padded);
  collect(call.grads.dk_weight, k_width, 2 * q_padded);
  collect(call.grads.dk_bias, k_width, 2 * q_padded + k_padded);
  return call.results();
}

}  // namespace
}  // namespace internvl::cpu

STABLE_TORCH_LIBRARY_IMPL(internvl, CPU, m) {
  m.impl("clip_qk_layernorm", TORCH_BOX(&internvl::cpu::clip_qk_layernorm));
  m.impl("clip_qk_layernorm_backward", TORCH_BOX(&internvl::cpu::clip_qk_layernorm_backward));
}
