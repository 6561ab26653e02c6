// clip + QK LayerNorm, backward. Per row, with n the normalised row, s = dy * weight and means over
// the row: dx = (s - mean(s) - n * mean(s * n)) / std, zero where the clip cut; dweight = sum over
// rows of dy * n, dbias = sum of dy. Meaning: reference.clip_qk_layernorm.
//
// Grid: persistent teams, plan.q_workers of them for q, k_workers for k, v_workers for v; worker w
// takes the rows w, w + workers, ... of its part, so that the sums have a fixed order. A thread
// owns the columns of kVectors 16-byte vectors: it adds their parameter gradients up in registers
// and writes them once, to its worker's row of plan.sums; norm_reduce_kernel adds the workers up in
// order. The next row's x and dy arrive by cp.async while this one is worked on: each thread reads
// only what it copied itself, so no barrier is needed for them. Shared memory: 256 bytes for the
// sums across warps, then per team plan.stages x {x, dy} x [kVectors][team] vectors of 16 bytes: 8
// * width bytes for 16-bit rows and two stages. With one stage (rows of which two do not fit) the
// next row starts when this one was read for the last time. kVectors = 0: rows too long for that;
// read from memory each time, sums kept in plan.sums.
#pragma once

#include "cuda/ptx/cp_async.cuh"
#include "cuda/sm80/clip_qk_layernorm_traits.cuh"

namespace internvl::sm80 {

constexpr int kBwdMaxTeam = 512;  // 128 registers a thread
constexpr int kReduceColumns = kWarp;
constexpr int kReduceGroups = 8;
constexpr int kNormSumsBytes = 2 * kMaxTeamWarps * 4;

INTERNVL_MASK_FN int norm_stage_bytes(int team, int vectors) { return 2 * team * vectors * 16; }

struct NormReduceShared {
  float sums[kReduceGroups][kReduceColumns];
};

// One part of the rows.
template <class T>
struct NormPart {
  const T* x;
  const T* dy;  // null: zero
  T* dx;
  const void* weight;  // null: no norm
  const float* statistics;
  int64_t x_stride, dy_stride, dx_stride;
  int64_t width;
};

template <class T>
INTERNVL_PTX_FN NormPart<T> norm_part(const ClipQkLayernormParams& params,
                                      const ClipQkLayernormGrads& grads, int part) {
  const int64_t offset = part == 0   ? 0
                         : part == 1 ? params.q_width
                                     : params.q_width + params.k_width;
  NormPart<T> result;
  result.x = static_cast<const T*>(params.qkv) + offset;
  result.dx = static_cast<T*>(grads.grad_qkv) + offset;
  result.dy = static_cast<const T*>(part == 0   ? grads.grad_q
                                    : part == 1 ? grads.grad_k
                                                : grads.grad_v);
  result.weight = part == 0 ? params.q_weight : part == 1 ? params.k_weight : nullptr;
  result.statistics = params.statistics + (part == 1 ? 2 : 0);
  result.x_stride = params.qkv_stride;
  result.dx_stride = params.q_width + 2 * params.k_width;
  result.dy_stride = part == 0   ? grads.grad_q_stride
                     : part == 1 ? grads.grad_k_stride
                                 : grads.grad_v_stride;
  result.width = part == 0 ? params.q_width : params.k_width;
  return result;
}

// Gradient 0 outside the clip (and for NaN), as in torch.clamp.
INTERNVL_PTX_FN float clip_gradient(float x, float gradient, const ClipQkLayernormParams& params) {
  return !params.has_clip || (x >= -params.clip && x <= params.clip) ? gradient : 0.0f;
}

// dx of kVectorElements columns whose gradient behind the clip is `gradient`.
template <class T, class Gradient>
INTERNVL_PTX_FN ptx::U32x4 clip_gradients(const ClipQkLayernormParams& params,
                                          const float (&x)[kVectorElements<T>], Gradient gradient) {
  float dx[kVectorElements<T>];
  INTERNVL_UNROLL
  for (int e = 0; e < kVectorElements<T>; ++e) dx[e] = clip_gradient(x[e], gradient(e), params);
  return pack_vector<T>(dx);
}

template <class T>
INTERNVL_PTX_FN void copy_gradients(const ClipQkLayernormParams& params, const NormPart<T>& part,
                                    int64_t r, int lane, int team, bool aligned) {
  constexpr int kElements = kVectorElements<T>;
  const T* x_row = part.x + r * part.x_stride;
  const T* dy_row = part.dy ? part.dy + r * part.dy_stride : nullptr;
  for (int64_t d = int64_t{lane} * kElements; d < part.width; d += int64_t{team} * kElements) {
    float x[kElements], dy[kElements] = {};
    unpack_vector<T>(x, load_vector(x_row, d, part.width, aligned));
    if (dy_row) unpack_vector<T>(dy, load_vector(dy_row, d, part.width, aligned));
    store_vector(part.dx + r * part.dx_stride, d, part.width, aligned,
                 clip_gradients<T>(params, x, [&](int e) { return dy[e]; }));
  }
}

// The stages of a thread's own vectors of x and dy. kTeam: known when compiling; 0: when launched.
template <class T, int kVectors, int kTeam>
class NormRows {
 public:
  INTERNVL_PTX_FN NormRows(const NormPart<T>& part, uint32_t shared, int lane, int team,
                           bool aligned)
      : part_(part),
        shared_(shared + 16 * lane),
        lane_(lane),
        team_(kTeam ? kTeam : team),
        aligned_(aligned) {}

  INTERNVL_PTX_FN int64_t column(int j) const {
    return j * team_ * kVectorElements<T> + lane_ * kVectorElements<T>;
  }

  INTERNVL_PTX_FN void fetch(int64_t r, int stage) const {
    for_each_vector([&](int j) {
      const int64_t d = column(j);
      copy(address(stage, 0, j), part_.x + r * part_.x_stride, d);
      if (part_.dy) copy(address(stage, 1, j), part_.dy + r * part_.dy_stride, d);
    });
  }

  // Calls step(j) for the thread's vectors: one copy of the code each, or one for all where sums
  // take half of the registers.
  template <class Step>
  INTERNVL_PTX_FN void for_each_vector(Step step) const {
    if constexpr (kTeam == 0) {
      INTERNVL_UNROLL
      for (int j = 0; j < kVectors; ++j) step(j);
    } else {
      INTERNVL_NO_UNROLL
      for (int j = 0; j < kVectors; ++j) step(j);
    }
  }

  INTERNVL_PTX_FN void read_x(float (&x)[kVectorElements<T>], int stage, int j) const {
    unpack_vector<T>(x, ptx::ld_shared<ptx::U32x4>(address(stage, 0, j)));
  }

  INTERNVL_PTX_FN void read_dy(float (&dy)[kVectorElements<T>], int stage, int j) const {
    ptx::U32x4 raw{0, 0, 0, 0};
    if (part_.dy) raw = ptx::ld_shared<ptx::U32x4>(address(stage, 1, j));
    unpack_vector<T>(dy, raw);
  }

 private:
  INTERNVL_PTX_FN uint32_t address(int stage, int which, int j) const {
    return shared_ + 16 * team_ * ((2 * stage + which) * kVectors + j);
  }

  INTERNVL_PTX_FN void copy(uint32_t dst, const T* row, int64_t d) const {
    if (aligned_)
      ptx::cp_async_cg_16(dst, d < part_.width ? row + d : row, d < part_.width ? 16 : 0);
    else
      ptx::st_shared(dst, load_vector(row, d, part_.width, false));
  }

  const NormPart<T>& part_;
  uint32_t shared_;
  int lane_, team_;
  bool aligned_;
};

template <int kElements>
INTERNVL_PTX_FN void store_sums(float* sums, const float (&x)[kElements], int64_t d, int64_t width,
                                bool aligned) {
  INTERNVL_UNROLL
  for (int e = 0; e < kElements; e += 4)
    store_vector(sums, d + e, width, aligned,
                 pack_vector<float>({x[e], x[e + 1], x[e + 2], x[e + 3]}));
}

// All rows of a worker; its parameter gradients go to sums [2][width].
template <class T, int kVectors, int kTeam>
INTERNVL_PTX_FN void norm_rows_backward(const ClipQkLayernormParams& params,
                                        const NormPart<T>& part, int64_t worker, int64_t workers,
                                        int lane, const NormPlan& plan, bool aligned,
                                        uint32_t shared, TeamSum& sum, float* sums) {
  constexpr int kElements = kVectorElements<T>;
  const float scale = 1.0f / static_cast<float>(part.width);
  const NormRows<T, kVectors, kTeam> rows(part, shared, lane, plan.team, aligned);
  const int other = plan.stages - 1;  // which stage the next row is on its way to: stage ^ other
  float dweight[kVectors][kElements] = {}, dbias[kVectors][kElements] = {};
  if (worker < params.rows) rows.fetch(worker, 0);
  ptx::cp_async_commit_group();
  int stage = 0;
  for (int64_t r = worker; r < params.rows; r += workers, stage ^= other) {
    const bool more = r + workers < params.rows;
    if (more && other == 1) rows.fetch(r + workers, stage ^ 1);
    ptx::cp_async_commit_group();
    const float mean = ptx::ld_global_nc(part.statistics + 4 * r);  // of any float's address
    const float inverse_std = ptx::ld_global_nc(part.statistics + 4 * r + 1);
    ptx::cp_async_wait_group<1>();
    float total = 0.0f, dot = 0.0f;
    INTERNVL_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      float x[kElements], dy[kElements], w[kElements];
      rows.read_x(x, stage, j);
      rows.read_dy(dy, stage, j);
      load_parameters<T>(w, part.weight, params.parameter_dtype, rows.column(j), part.width,
                         aligned);
      INTERNVL_UNROLL
      for (int e = 0; e < kElements; ++e) {
        // dy and w are zero beyond the width: so is every sum.
        const float normal = (clip_value(x[e], params) - mean) * inverse_std;
        const float scaled = dy[e] * w[e];
        total += scaled;
        dot = ptx::fma(scaled, normal, dot);
        dweight[j][e] = ptx::fma(dy[e], normal, dweight[j][e]);
        dbias[j][e] += dy[e];
      }
    }
    const float mean_grad = sum(total) * scale;
    const float mean_dot = sum(dot) * scale;
    rows.for_each_vector([&](int j) {
      float x[kElements], dy[kElements], w[kElements];
      rows.read_x(x, stage, j);
      rows.read_dy(dy, stage, j);
      load_parameters<T>(w, part.weight, params.parameter_dtype, rows.column(j), part.width,
                         aligned);
      const ptx::U32x4 dx = clip_gradients<T>(params, x, [&](int e) {
        const float normal = (clip_value(x[e], params) - mean) * inverse_std;
        return (dy[e] * w[e] - mean_grad - normal * mean_dot) * inverse_std;
      });
      store_vector(part.dx + r * part.dx_stride, rows.column(j), part.width, aligned, dx);
    });
    if (more && other == 0) rows.fetch(r + workers, 0);
    ptx::cp_async_commit_group();
  }
  INTERNVL_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    store_sums(sums, dweight[j], rows.column(j), part.width, aligned);
    store_sums(sums + part.width, dbias[j], rows.column(j), part.width, aligned);
  }
}

// The same for rows of any length, straight from memory. A thread meets the same columns in every
// row, so `sums` needs no barrier.
template <class T>
INTERNVL_PTX_FN void long_rows_backward(const ClipQkLayernormParams& params,
                                        const NormPart<T>& part, int64_t worker, int64_t workers,
                                        int lane, int team, bool aligned, TeamSum& sum,
                                        float* sums) {
  constexpr int kElements = kVectorElements<T>;
  const float scale = 1.0f / static_cast<float>(part.width);
  const int64_t first = int64_t{lane} * kElements, span = int64_t{team} * kElements;
  const auto load = [&](int64_t r, int64_t d, float (&x)[kElements], float (&dy)[kElements],
                        float (&w)[kElements]) {
    unpack_vector<T>(x, load_vector(part.x + r * part.x_stride, d, part.width, aligned));
    ptx::U32x4 raw{0, 0, 0, 0};
    if (part.dy) raw = load_vector(part.dy + r * part.dy_stride, d, part.width, aligned);
    unpack_vector<T>(dy, raw);
    load_parameters<T>(w, part.weight, params.parameter_dtype, d, part.width, aligned);
  };
  for (int64_t r = worker; r < params.rows; r += workers) {
    const float mean = ptx::ld_global_nc(part.statistics + 4 * r);  // of any float's address
    const float inverse_std = ptx::ld_global_nc(part.statistics + 4 * r + 1);
    float total = 0.0f, dot = 0.0f;
    for (int64_t d = first; d < part.width; d += span) {
      float x[kElements], dy[kElements], w[kElements];
      load(r, d, x, dy, w);
      INTERNVL_UNROLL
      for (int e = 0; e < kElements; ++e) {
        if (d + e >= part.width) continue;
        const float normal = (clip_value(x[e], params) - mean) * inverse_std;
        total += dy[e] * w[e];
        dot = ptx::fma(dy[e] * w[e], normal, dot);
        float* dweight = sums + d + e;
        float* dbias = dweight + part.width;
        const bool begun = r != worker;
        ptx::st_global(dweight, ptx::fma(dy[e], normal, begun ? ptx::ld_global(dweight) : 0.0f));
        ptx::st_global(dbias, (begun ? ptx::ld_global(dbias) : 0.0f) + dy[e]);
      }
    }
    const float mean_grad = sum(total) * scale;
    const float mean_dot = sum(dot) * scale;
    for (int64_t d = first; d < part.width; d += span) {
      float x[kElements], dy[kElements], w[kElements];
      load(r, d, x, dy, w);
      const ptx::U32x4 dx = clip_gradients<T>(params, x, [&](int e) {
        const float normal = (clip_value(x[e], params) - mean) * inverse_std;
        return (dy[e] * w[e] - mean_grad - normal * mean_dot) * inverse_std;
      });
      store_vector(part.dx + r * part.dx_stride, d, part.width, aligned, dx);
    }
  }
}

template <class T, int kVectors, int kTeam, bool kAligned>
__global__ __launch_bounds__(kBwdMaxTeam, 1) void clip_qk_layernorm_bwd_kernel(
    const ClipQkLayernormParams params, const ClipQkLayernormGrads grads, const NormPlan plan) {
  // A team that fills the block: what depends on the block alone needs no registers of the threads.
  const int lane = static_cast<int>(threadIdx.x) % (kTeam ? kTeam : plan.team);
  const int slot = kTeam ? 0 : static_cast<int>(threadIdx.x) / plan.team;
  // The first blocks belong to q, the next ones to k, the rest to v.
  int64_t worker = int64_t{blockIdx.x} * plan.teams + slot;
  int which = 0;
  int64_t workers = plan.q_workers;
  float* sums = plan.sums;
  if (worker >= plan.q_workers) {
    worker -= plan.q_workers;
    which = worker < plan.k_workers ? 1 : 2;
    workers = which == 1 ? plan.k_workers : plan.v_workers;
    if (which == 2) worker -= plan.k_workers;
    sums += 2 * plan.q_workers * params.q_width;
  }
  const NormPart<T> part = norm_part<T>(params, grads, which);
  if (!part.weight) {
    for (int64_t r = worker; r < params.rows; r += workers)
      copy_gradients(params, part, r, lane, plan.team, kAligned);
    return;
  }
  const uint32_t shared = ptx::dynamic_shared();
  TeamSum sum(shared, plan.team);
  sums += 2 * worker * part.width;
  if constexpr (kVectors == 0) {
    long_rows_backward(params, part, worker, workers, lane, plan.team, kAligned, sum, sums);
  } else {
    const uint32_t own =
        shared + kNormSumsBytes + slot * plan.stages * norm_stage_bytes(plan.team, kVectors);
    norm_rows_backward<T, kVectors, kTeam>(params, part, worker, workers, lane, plan, kAligned, own,
                                           sum, sums);
  }
}

// Grid: x = 32 columns of the flat [2][width] sums of a part, y = part (0 q, 1 k). Group g adds up
// the workers g, g + 8, ...; then the groups are added up in order. Without workers: zeros.
__global__ __launch_bounds__(kReduceGroups* kReduceColumns) void norm_reduce_kernel(
    const ClipQkLayernormParams params, const ClipQkLayernormGrads grads, const NormPlan plan) {
  const int part = static_cast<int>(blockIdx.y);
  const int64_t width = part == 0 ? params.q_width : params.k_width;
  float* dweight = part == 0 ? grads.dq_weight : grads.dk_weight;
  float* dbias = part == 0 ? grads.dq_bias : grads.dk_bias;
  if (!dweight) return;
  const int64_t column = int64_t{blockIdx.x} * kReduceColumns + threadIdx.x % kReduceColumns;
  const int group = static_cast<int>(threadIdx.x) / kReduceColumns;
  const float* sums = plan.sums + (part == 1 ? 2 * plan.q_workers * params.q_width : 0);
  const int64_t workers = part == 0 ? plan.q_workers : plan.k_workers;
  float total = 0.0f;
  if (column < 2 * width)
    for (int64_t worker = group; worker < workers; worker += kReduceGroups)
      total += ptx::ld_global_nc(sums + worker * 2 * width + column);
  const uint32_t shared = ptx::dynamic_shared();
  ptx::st_shared(shared + 4 * threadIdx.x, total);
  ptx::sync_threads();
  if (group > 0 || column >= 2 * width) return;
  for (int g = 1; g < kReduceGroups; ++g)
    total += ptx::ld_shared<float>(shared + 4 * (threadIdx.x + g * kReduceColumns));
  if (column < width)
    ptx::st_global(dweight + column, total);
  else if (dbias)
    ptx::st_global(dbias + column - width, total);
}

}  // namespace internvl::sm80
