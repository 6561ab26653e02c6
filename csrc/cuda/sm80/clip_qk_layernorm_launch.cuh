// Plans and launches of clip_qk_layernorm; included by clip_qk_layernorm.cu and by the emulator.
#pragma once

#include <algorithm>

#include "cuda/ptx/launch.cuh"
#include "cuda/sm80/clip_qk_layernorm.h"
#include "cuda/sm80/clip_qk_layernorm_bwd_kernel.cuh"
#include "cuda/sm80/clip_qk_layernorm_fwd_kernel.cuh"

namespace internvl::sm80 {
namespace {

constexpr int kNarrowTeams = 4;    // rows a block works on when a warp is enough for one
constexpr int kBwdThreads = 512;   // resident threads of a multiprocessor the registers allow
constexpr int64_t kRowCost = 512;  // what a row costs beside its elements, in elements
constexpr int64_t kMaxGrid = 0x7fffffff;

int64_t norm_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Are `row` and the rows `stride` elements apart made of whole 16-byte vectors?
bool whole_vectors(const void* row, int64_t stride, int64_t width, int bytes) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0 && stride * bytes % 16 == 0 &&
         width * bytes % 16 == 0;
}

bool whole_parameters(const void* a, const void* b) {
  return reinterpret_cast<uintptr_t>(a) % 16 == 0 && reinterpret_cast<uintptr_t>(b) % 16 == 0;
}

// Teams for the widest part, `vectors` of 16 bytes a thread.
NormPlan norm_plan(const ClipQkLayernormParams& params, int vectors, int max_team) {
  NormPlan plan;
  const int64_t widest = std::max(params.q_width, params.k_width);
  const int64_t count = norm_ceil_div(widest * element_bytes(params.dtype), 16);
  plan.team = static_cast<int>(std::clamp<int64_t>(
      norm_ceil_div(norm_ceil_div(count, vectors), kWarp) * kWarp, kWarp, max_team));
  plan.teams = plan.team == kWarp ? kNarrowTeams : 1;
  return plan;
}

bool rows_fit(const ClipQkLayernormParams& params, int64_t vectors) {
  return std::max(params.q_width, params.k_width) * element_bytes(params.dtype) <= 16 * vectors;
}

template <class T>
LaunchStatus fwd_for(const ClipQkLayernormParams& params, void* stream) {
  NormPlan plan = norm_plan(params, kFwdVectors, kFwdMaxTeam<T>);
  const T* x = static_cast<const T*>(params.qkv);
  const int64_t offsets[3] = {0, params.q_width, params.q_width + params.k_width};
  const void* outs[3] = {params.q, params.k, params.v};
  const void* weights[3] = {params.q_weight, params.k_weight, nullptr};
  const void* biases[3] = {params.q_bias, params.k_bias, nullptr};
  for (int part = 0; part < 3; ++part) {
    const int64_t width = part == 0 ? params.q_width : params.k_width;
    plan.aligned = plan.aligned &&
                   whole_vectors(x + offsets[part], params.qkv_stride, width, sizeof(T)) &&
                   whole_vectors(outs[part], width, width, sizeof(T)) &&
                   whole_parameters(weights[part], biases[part]);
  }
  const int64_t blocks = norm_ceil_div(params.rows, plan.teams);
  if (blocks > kMaxGrid) return {"clip_qk_layernorm: too many rows for a grid"};
  const ptx::LaunchConfig config{"clip_qk_layernorm",
                                 {static_cast<unsigned>(blocks), 3, 1},
                                 plan.team * plan.teams,
                                 static_cast<int>(sizeof(NormFwdShared)),
                                 stream};
  const bool whole = rows_fit(params, int64_t{kFwdVectors} * kFwdMaxTeam<T>);
  const auto kernel = whole          ? plan.aligned ? clip_qk_layernorm_fwd_kernel<T, true, true>
                                                    : clip_qk_layernorm_fwd_kernel<T, true, false>
                      : plan.aligned ? clip_qk_layernorm_fwd_kernel<T, false, true>
                                     : clip_qk_layernorm_fwd_kernel<T, false, false>;
  return ptx::launch(kernel, config, params, plan);
}

int bwd_shared_bytes(const NormPlan& plan, int vectors) {
  return kNormSumsBytes + plan.teams * plan.stages * norm_stage_bytes(plan.team, vectors);
}

// Vectors of a thread: 16 columns, or 32 when a block has no more threads; 0: rows that are longer
// than that, or of which shared memory does not hold one.
int bwd_vectors(const ClipQkLayernormParams& params, NormPlan plan, const DeviceInfo& device) {
  const int few = element_bytes(params.dtype);
  const int vectors = rows_fit(params, int64_t{few} * kBwdMaxTeam)       ? few
                      : rows_fit(params, int64_t{2 * few} * kBwdMaxTeam) ? 2 * few
                                                                         : 0;
  plan.stages = 1;
  return bwd_shared_bytes(plan, vectors) <= device.max_shared_bytes ? vectors : 0;
}

// As many blocks as the device holds at once, dealt out by the width of the parts.
NormPlan bwd_plan(const ClipQkLayernormParams& params, const ClipQkLayernormGrads& grads,
                  const DeviceInfo& device) {
  const int bytes = element_bytes(params.dtype);
  NormPlan plan = norm_plan(params, bytes, kBwdMaxTeam);
  const int vectors = plan.vectors = bwd_vectors(params, plan, device);
  if (bwd_shared_bytes(plan, vectors) > device.max_shared_bytes) plan.stages = 1;
  const int resident =
      std::max(1, std::min(kBwdThreads / (plan.team * plan.teams),
                           device.max_shared_bytes / bwd_shared_bytes(plan, vectors)));
  const int64_t blocks = int64_t{std::max(device.multiprocessors, 1)} * resident;
  const int64_t q_cost = params.q_width + kRowCost, k_cost = params.k_width + kRowCost;
  const void* dys[3] = {grads.grad_q, grads.grad_k, grads.grad_v};
  const int64_t dy_strides[3] = {grads.grad_q_stride, grads.grad_k_stride, grads.grad_v_stride};
  const void* weights[3] = {params.q_weight, params.k_weight, nullptr};
  int* workers[3] = {&plan.q_workers, &plan.k_workers, &plan.v_workers};
  int64_t offset = 0;
  for (int part = 0; part < 3; ++part) {
    const int64_t width = part == 0 ? params.q_width : params.k_width;
    const int64_t share = blocks * (part == 0 ? q_cost : k_cost) / (q_cost + 2 * k_cost);
    const int64_t most = norm_ceil_div(params.rows, plan.teams);
    *workers[part] = static_cast<int>(std::min(std::max<int64_t>(share, 1), most) * plan.teams);
    const auto* x = static_cast<const char*>(params.qkv) + offset * bytes;
    const auto* dx = static_cast<const char*>(grads.grad_qkv) + offset * bytes;
    plan.aligned = plan.aligned && whole_vectors(x, params.qkv_stride, width, bytes) &&
                   whole_vectors(dx, params.width(), width, bytes) &&
                   whole_vectors(dys[part], dy_strides[part], width, bytes) &&
                   whole_parameters(weights[part], nullptr);
    offset += width;
  }
  return plan;
}

template <class T>
LaunchStatus bwd_for(const ClipQkLayernormParams& params, const ClipQkLayernormGrads& grads,
                     const NormPlan& plan, void* stream) {
  const int workers = plan.q_workers + plan.k_workers + plan.v_workers;
  const ptx::LaunchConfig config{"clip_qk_layernorm_bwd",
                                 {static_cast<unsigned>(workers / plan.teams), 1, 1},
                                 plan.team * plan.teams,
                                 bwd_shared_bytes(plan, plan.vectors),
                                 stream};
  constexpr int kFew = static_cast<int>(sizeof(T));
  const auto choose = [&](auto aligned) {
    constexpr bool kAligned = decltype(aligned)::value;
    return plan.vectors == kFew ? clip_qk_layernorm_bwd_kernel<T, kFew, 0, kAligned>
           : plan.vectors == 2 * kFew
               ? clip_qk_layernorm_bwd_kernel<T, 2 * kFew, kBwdMaxTeam, kAligned>
               : clip_qk_layernorm_bwd_kernel<T, 0, 0, kAligned>;
  };
  const auto kernel = plan.aligned ? choose(std::true_type{}) : choose(std::false_type{});
  return ptx::launch(kernel, config, params, grads, plan);
}

}  // namespace

LaunchStatus clip_qk_layernorm_fwd(const ClipQkLayernormParams& params, const DeviceInfo&,
                                   void* stream) {
  switch (params.dtype) {
    case DType::kBFloat16:
      return fwd_for<ptx::Bf16>(params, stream);
    case DType::kFloat16:
      return fwd_for<ptx::Fp16>(params, stream);
    default:
      return fwd_for<float>(params, stream);
  }
}

int64_t clip_qk_layernorm_bwd_workspace_bytes(const ClipQkLayernormParams& params,
                                              const ClipQkLayernormGrads& grads,
                                              const DeviceInfo& device) {
  const NormPlan plan = bwd_plan(params, grads, device);
  const int64_t floats = 2 * (plan.q_workers * params.q_width + plan.k_workers * params.k_width);
  return floats * static_cast<int64_t>(sizeof(float));
}

LaunchStatus clip_qk_layernorm_bwd(const ClipQkLayernormParams& params,
                                   const ClipQkLayernormGrads& grads, const DeviceInfo& device,
                                   void* workspace, void* stream) {
  NormPlan plan = bwd_plan(params, grads, device);
  plan.sums = static_cast<float*>(workspace);
  LaunchStatus status =
      params.dtype == DType::kBFloat16  ? bwd_for<ptx::Bf16>(params, grads, plan, stream)
      : params.dtype == DType::kFloat16 ? bwd_for<ptx::Fp16>(params, grads, plan, stream)
                                        : bwd_for<float>(params, grads, plan, stream);
  if (!status.ok() || (!grads.dq_weight && !grads.dk_weight)) return status;
  const int64_t columns = 2 * std::max(params.q_width, params.k_width);
  const ptx::LaunchConfig config{
      "norm_reduce",
      {static_cast<unsigned>(norm_ceil_div(columns, kReduceColumns)), 2, 1},
      kReduceGroups * kReduceColumns,
      static_cast<int>(sizeof(NormReduceShared)),
      stream};
  return ptx::launch(norm_reduce_kernel, config, params, grads, plan);
}

}  // namespace internvl::sm80
