// CPU registration of prefix_attn: check, cut the call into tasks, run them on the ISA's kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/outputs.h"
#include "cpu/decode_plan.h"
#include "cpu/kernels.h"
#include "cpu/key_tiles.h"
#include "cpu/parallel.h"

namespace internvl::cpu {

namespace {

using torch::headeronly::ScalarType;

// --- forward
// --------------------------------------------------------------------------------------------------

constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kBlockM = 48;       // rows per tile: a multiple of every ISA's micro-kernel rows
constexpr int64_t kEnoughTasks = 16;  // split the keys of a call with fewer row tiles than this
constexpr int64_t kMinTilesPerSplit = 4;

std::vector<RowTask> cut_rows(const FwdPlan& plan) {
  const PrefixAttnParams& params = plan.params;
  const int64_t group = params.group();
  const int64_t heads_per_tile =
      params.seqlen_q < plan.block_m
          ? std::min(group, plan.block_m / std::max<int64_t>(params.seqlen_q, 1))
          : 1;
  std::vector<RowTask> tasks;
  for (int64_t b = 0; b < params.batch; ++b) {
    const KeyMask mask = key_mask(params, b);
    for (int64_t head_kv = 0; head_kv < params.heads_kv; ++head_kv)
      for (int64_t head0 = 0; head0 < group; head0 += heads_per_tile)
        for (int64_t row0 = 0; row0 < params.seqlen_q; row0 += plan.block_m) {
          RowTask task{};
          task.b = b;
          task.head_kv = head_kv;
          task.head0 = head0;
          task.heads = std::min(heads_per_tile, group - head0);
          task.row0 = row0;
          task.rows = std::min(plan.block_m, params.seqlen_q - row0);
          const int64_t p_hi = query_position(mask.first_position, row0 + task.rows - 1);
          const int64_t end =
              mask.flags ? mask.seqlen_k : visible_key_end(p_hi, mask.prefix_len, mask.end);
          task.cost = task.heads * task.rows * std::max<int64_t>(end - mask.start, 0);
          task.tile_begin = 0;
          task.tile_end = plan.keys.count;
          tasks.push_back(task);
        }
  }
  return tasks;
}

// Every task becomes plan.splits consecutive ones over runs of key tiles, each with its own partial
// result.
std::vector<RowTask> split_keys(const FwdPlan& plan, const std::vector<RowTask>& whole,
                                float* partial) {
  std::vector<RowTask> tasks;
  tasks.reserve(whole.size() * plan.splits);
  for (const RowTask& task : whole)
    for (int64_t split = 0; split < plan.splits; ++split) {
      RowTask part = task;
      part.tile_begin = plan.keys.count * split / plan.splits;
      part.tile_end = plan.keys.count * (split + 1) / plan.splits;
      part.partial = partial;
      partial += plan.partial_floats();
      tasks.push_back(part);
    }
  return tasks;
}

// Packs `heads` KV heads from plan.packed_head0 on.
void pack_heads(const FwdPlan& plan, int64_t heads, double flops) {
  const Kernels& isa = kernels();
  const PrefixAttnParams& params = plan.params;
  const int dtype = static_cast<int>(params.dtype);
  run_tasks(heads * plan.keys.count, 0, flops, [&](int64_t index, float*) {
    const int64_t head = plan.packed_head0 + index / plan.keys.count;
    const int64_t b = head / params.heads_kv, head_kv = head % params.heads_kv;
    const int64_t tile = index % plan.keys.count;
    if (params.alibi_prune)
      plan.k_norms[index] = isa.key_tile_norm[dtype](params, plan.keys.used, b, head_kv,
                                                     tile * plan.keys.block_n, plan.keys.block_n);
    isa.pack_kv_tile[dtype](plan, b, head_kv, tile, plan.packed_k + index * plan.k_tile_floats(),
                            plan.packed_v + index * plan.v_tile_floats());
  });
}

// KV heads packed at a time: what the last-level cache holds, and enough tasks to share out.
int64_t heads_per_wave(const FwdPlan& plan, int64_t tasks_per_head) {
  constexpr int64_t kWaveFloats = 2 << 20, kWaveTasks = 64;
  const int64_t head_floats =
      std::max<int64_t>(1, plan.keys.count * (plan.k_tile_floats() + plan.v_tile_floats()));
  const int64_t wave = std::max(kWaveFloats / head_floats, ceil_div(kWaveTasks, tasks_per_head));
  return std::min(std::max<int64_t>(wave, 1), plan.params.batch * plan.params.heads_kv);
}

// The row tiles of a few KV heads after those of another few: their packed tiles are read again and
// again while the cache holds them, and the memory is that of a few heads only.
void run_waves(const Tensor& q, FwdPlan& plan, std::vector<RowTask>& tasks, double flops) {
  const Kernels& isa = kernels();
  const int dtype = static_cast<int>(plan.params.dtype);
  const int64_t kv_heads = plan.params.batch * plan.params.heads_kv;
  const int64_t per_head = static_cast<int64_t>(tasks.size()) / kv_heads;
  const bool packs = per_head > 2 * plan.splits;  // else by the one or two row tiles that read them
  const int64_t wave = packs ? heads_per_wave(plan, per_head) : kv_heads;
  const int64_t tiles = wave * plan.keys.count;
  Tensor packed;
  if (packs) {
    packed = torch::stable::new_empty(
        q, {tiles * (plan.k_tile_floats() + plan.v_tile_floats() + 1)}, ScalarType::Float);
    plan.packed_k = static_cast<float*>(packed.mutable_data_ptr());
    plan.packed_v = plan.packed_k + tiles * plan.k_tile_floats();
    plan.k_norms = plan.packed_v + tiles * plan.v_tile_floats();
  }
  for (int64_t head = 0; head < kv_heads; head += wave) {
    const int64_t heads = std::min(wave, kv_heads - head);
    plan.packed_head0 = head;
    if (packs) pack_heads(plan, heads, flops);
    RowTask* first = tasks.data() + head * per_head;
    if (plan.splits == 1)
      std::stable_sort(first, first + heads * per_head,
                       [](const RowTask& a, const RowTask& b) { return a.cost > b.cost; });
    run_tasks(heads * per_head, plan.scratch_floats(), flops, [&](int64_t index, float* scratch) {
      isa.fwd_row_tile[dtype](plan, first[index], scratch);
    });
  }
}

void run_forward(const Tensor& q, const PrefixAttnParams& params) {
  const Kernels& isa = kernels();
  const int dtype = static_cast<int>(params.dtype);
  FwdPlan plan;
  plan.params = params;
  plan.block_m = std::min(kBlockM, params.group() * params.seqlen_q);
  plan.padded_dim = round_up(params.head_dim, isa.lanes);
  plan.prune_threshold = prune_threshold(params.dtype, params.seqlen_k) * kLog2E;
  KeyTileData key_data;
  plan.keys = key_data.build(
      params,
      std::min<int64_t>(kMaxBlockN, round_up(std::max<int64_t>(params.seqlen_k, 1), isa.panel)));
  std::vector<RowTask> tasks = cut_rows(plan);
  double cost = 0.0;
  for (const RowTask& task : tasks) cost += static_cast<double>(task.cost);
  const double flops = 4.0 * cost * static_cast<double>(params.head_dim);

  const int64_t count = static_cast<int64_t>(tasks.size());
  if (count < kEnoughTasks)
    plan.splits = std::max<int64_t>(
        1, std::min(ceil_div(kEnoughTasks, count), plan.keys.count / kMinTilesPerSplit));
  Tensor partial;
  if (plan.splits > 1) {
    partial = torch::stable::new_empty(q, {count * plan.splits * plan.partial_floats()},
                                       ScalarType::Float);
    tasks = split_keys(plan, tasks, static_cast<float*>(partial.mutable_data_ptr()));
  }
  run_waves(q, plan, tasks, flops);
  if (plan.splits > 1)
    run_tasks(count, plan.padded_dim, flops / 64, [&](int64_t index, float* scratch) {
      isa.merge_splits[dtype](plan, tasks[index * plan.splits], scratch);
    });
}

// --- decoding
// --------------------------------------------------------------------------------------------------

void run_decode(const Tensor& q, const PrefixAttnParams& params) {
  const Kernels& isa = kernels();
  const int dtype = static_cast<int>(params.dtype);
  DecodePlan plan;
  plan.params = params;
  shape_decode(plan, isa.lanes);
  KeyTileData key_data;
  plan.keys = key_data.build(
      params, std::min<int64_t>(plan.dots() ? kMaxBlockN : 4 * kStagedKeys,
                                round_up(std::max<int64_t>(params.seqlen_k, 1), isa.panel)));
  std::vector<DecodeTask> tasks;
  const int64_t partial_floats = cut_decode(plan, isa.lanes, tasks);
  Tensor partial;
  float* next = nullptr;
  if (partial_floats > 0) {
    partial = torch::stable::new_empty(q, {partial_floats}, ScalarType::Float);
    next = static_cast<float*>(partial.mutable_data_ptr());
  }
  std::vector<int64_t> merges;  // the first part of each split
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (tasks[i].parts == 1) continue;
    if (merges.empty() || static_cast<int64_t>(i) >= merges.back() + tasks[merges.back()].parts)
      merges.push_back(static_cast<int64_t>(i));
    tasks[i].partial = next;
    next += plan.partial_floats(tasks[i].heads);
  }
  const double flops = 4.0 * static_cast<double>(params.batch * params.heads_q) * params.seqlen_q *
                       params.seqlen_k * params.head_dim;
  run_tasks(
      static_cast<int64_t>(tasks.size()), plan.scratch_floats(), flops,
      [&](int64_t index, float* scratch) { isa.decode_task[dtype](plan, tasks[index], scratch); });
  run_tasks(static_cast<int64_t>(merges.size()), plan.padded_dim, flops / 64,
            [&](int64_t index, float* scratch) {
              isa.merge_decode[dtype](plan, tasks[merges[index]], scratch);
            });
}

std::tuple<Tensor, Tensor> prefix_attn(Tensor q, Tensor k, Tensor v, OptionalTensor prefix_len,
                                       OptionalTensor key_range, OptionalTensor query_start,
                                       OptionalTensor key_flags, OptionalTensor segment_ids,
                                       OptionalTensor alibi_slopes,
                                       std::optional<double> softmax_scale, int64_t window) {
  PrefixAttnTensors tensors{q,           k,         v,           prefix_len,  key_range,
                            query_start, key_flags, segment_ids, alibi_slopes};
  PrefixAttnParams params = check_prefix_attn(tensors, softmax_scale, window);
  check_key_range_values(params);
  const auto outputs = new_prefix_attn_outputs(q, &params);
  const bool nothing = params.batch * params.heads_q * params.seqlen_q == 0;
  if (!nothing && is_decode(params))
    run_decode(q, params);
  else if (!nothing)
    run_forward(q, params);
  return outputs;
}

// --- backward
// -------------------------------------------------------------------------------------------------

constexpr int64_t kBwdBlockM = 64;
constexpr int64_t kBwdBlockN =
    96;  // halved above head_dim 128, so that a tile pair stays in the second-level cache
constexpr int64_t kEnoughUnits =
    8;  // cut the keys of a call with fewer KV heads than this into chunks

void run_backward(const Tensor& q, const PrefixAttnParams& params, const PrefixAttnGrads& grads) {
  const Kernels& isa = kernels();
  const int dtype = static_cast<int>(params.dtype);
  BwdPlan plan;
  plan.params = params;
  plan.grads = grads;
  plan.padded_dim = round_up(params.head_dim, isa.lanes);
  plan.block_m = std::min(kBwdBlockM, round_up(std::max<int64_t>(params.seqlen_q, 1), isa.panel));
  plan.padded_rows = round_up(params.seqlen_q, plan.block_m);
  KeyTileData key_data;
  const int64_t block_n = params.head_dim <= 128 ? kBwdBlockN : kBwdBlockN / 2;
  plan.keys =
      key_data.build(params, std::min(block_n, round_up(std::max<int64_t>(params.seqlen_k, 1), 8)));
  const int64_t kv_heads = params.batch * params.heads_kv;
  if (kv_heads == 0) {
    if (grads.dalibi_slopes)
      std::fill(grads.dalibi_slopes, grads.dalibi_slopes + params.heads_q, 0.0f);
    return;
  }
  plan.prune_threshold = prune_threshold(params.dtype, params.seqlen_k) * kLog2E;
  plan.chunks = std::max<int64_t>(1, std::min(ceil_div(kEnoughUnits, kv_heads), plan.keys.count));
  const double flops = 10.0 * static_cast<double>(params.batch * params.heads_q) * params.seqlen_q *
                       params.seqlen_k * params.head_dim;
  Tensor dq_parts =
      torch::stable::new_empty(q, {plan.chunks * plan.dq_part_floats()}, ScalarType::Float);
  plan.dq_parts = static_cast<float*>(dq_parts.mutable_data_ptr());
  std::vector<double> dslope_parts(grads.dalibi_slopes ? plan.chunks * params.batch * params.heads_q
                                                       : 0);
  plan.dslope_parts = grads.dalibi_slopes ? dslope_parts.data() : nullptr;

  // The last chunks of a causal mask hold as much work as the first: tiles are dealt out in turn.
  run_tasks(
      kv_heads * plan.chunks, plan.scratch_floats(), flops, [&](int64_t index, float* scratch) {
        const int64_t head = index / plan.chunks;
        isa.bwd_unit[dtype](
            plan, {head / params.heads_kv, head % params.heads_kv, index % plan.chunks}, scratch);
      });
  const int64_t row_tiles = ceil_div(params.seqlen_q, plan.block_m);
  run_tasks(params.batch * params.heads_q * row_tiles, 0, flops / 64, [&](int64_t index, float*) {
    const int64_t head = index / row_tiles, row0 = index % row_tiles * plan.block_m;
    isa.reduce_dq[dtype](plan, head / params.heads_q, head % params.heads_q, row0,
                         std::min(plan.block_m, params.seqlen_q - row0));
  });
  if (grads.dalibi_slopes)
    for (int64_t head = 0; head < params.heads_q; ++head) {
      double sum = 0.0;
      for (int64_t part = 0; part < plan.chunks * params.batch; ++part)
        sum += dslope_parts[part * params.heads_q + head];
      grads.dalibi_slopes[head] = static_cast<float>(sum);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prefix_attn_backward(
    Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor prefix_len, OptionalTensor key_range, OptionalTensor query_start,
    OptionalTensor key_flags, OptionalTensor segment_ids, OptionalTensor alibi_slopes,
    std::optional<double> softmax_scale, int64_t window) {
  PrefixAttnTensors tensors{q,           k,         v,           prefix_len,  key_range,
                            query_start, key_flags, segment_ids, alibi_slopes};
  PrefixAttnParams params = check_prefix_attn(tensors, softmax_scale, window);
  check_key_range_values(params);
  PrefixAttnBackwardCall call(tensors, grad_out, grad_lse, out, lse, &params);
  run_backward(q, params, call.grads);
  return call.results();
}

int64_t cpu_isa() { return &isa_in_use() - kIsaTable; }

}  // namespace
}  // namespace internvl::cpu

STABLE_TORCH_LIBRARY_IMPL(internvl, CPU, m) {
  m.impl("prefix_attn", TORCH_BOX(&internvl::cpu::prefix_attn));
  m.impl("prefix_attn_backward", TORCH_BOX(&internvl::cpu::prefix_attn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(internvl, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&internvl::cpu::cpu_isa));
}
