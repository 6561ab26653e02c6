// Small kernels with one mistake each.
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "named.h"

namespace internvl::selftest {
namespace {

enum class Fault {
  kSharedLoad,
  kSharedStore,
  kGlobalLoad,
  kGlobalStore,
  kCopySource,
  kCopyTarget,
  kNoBase,
};

template <Fault kFault>
__global__ void out_of_bounds_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  ptx::st_shared(shared + 4 * t, 1.0f);
  if (kFault == Fault::kSharedLoad) ptx::ld_shared<float>(shared + 4096);
  if (kFault == Fault::kSharedStore) ptx::st_shared(shared + 4096 - 8 + 4 * t, 1.0f);
  if (kFault == Fault::kGlobalLoad) ptx::ld_global(in + 193 + t);
  if (kFault == Fault::kGlobalStore) ptx::st_global(out - 1, 1.0f);
  if (kFault == Fault::kCopySource)
    ptx::cp_async_cg_16(shared + 1024 + 16 * t, in + 252 + 4 * (t == 5), 16);
  if (kFault == Fault::kCopyTarget) ptx::cp_async_cg_16(shared + 4096, in, 16);
  if (kFault == Fault::kNoBase) ptx::ld_shared<float>(4 * t);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
}

template <int kFault>
__global__ void misaligned_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  if (kFault == 0) ptx::st_shared(shared + 8 + 16 * t, ptx::U32x4{});
  if (kFault == 1) ptx::ld_global(reinterpret_cast<const ptx::F32x2*>(in + 1));
  if (kFault == 2) ptx::cp_async_cg_16(shared + 16 * t, in + 2, 16);
  if (kFault == 3) ptx::st_global(reinterpret_cast<ptx::F32x4*>(out + 2), ptx::F32x4{});
}

template <int kFault>
__global__ void uninitialised_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  if (kFault == 0) ptx::ld_shared<float>(shared + 4 * t);
  if (kFault == 1) {
    ptx::st_shared(shared + 4 * t, uint16_t{1});
    ptx::ld_shared<float>(shared + 4 * t);
  }
  if (kFault == 2) ptx::ld_global(static_cast<const float*>(out) + t);
  if (kFault == 3) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, shared + 16 * (t % 32));
  }
}

__global__ void write_input_kernel(KERNEL_ARGUMENTS) {
  ptx::st_global(const_cast<float*>(in) + threadIdx.x, 0.0f);
  ptx::st_global(out, 0.0f);
}

template <int kFault>
__global__ void divergence_kernel(KERNEL_ARGUMENTS) {
  const uint32_t t = threadIdx.x;
  float v = ptx::ld_global(in + t);
  if (kFault == 0 && t % 32 < 16) v += ptx::shfl_bfly(v, 1);
  if (kFault == 1) {
    if (t % 32 < 16)
      v += ptx::shfl_bfly(v, 1);
    else
      v -= ptx::shfl_bfly(v, 1);
  }
  if (kFault == 2 && t % 32 == 7) return;
  if (kFault == 3 && t % 32 == 7) ptx::sync_warp();
  v += ptx::shfl_bfly(v, 2);
  ptx::st_global(out + t, v);
}

template <int kFault>
__global__ void barrier_kernel(KERNEL_ARGUMENTS) {
  const uint32_t t = threadIdx.x;
  if (kFault == 0 && t < 32) ptx::sync_threads();       // the other warp never comes
  if (kFault == 1) ptx::bar_sync(1, t < 32 ? 64 : 32);  // different sizes
  if (kFault == 2) ptx::bar_sync(16, 64);               // no such barrier
  if (kFault == 3) ptx::bar_sync(t % 2, 64);            // lanes name different ones
  if (kFault == 4) {
    ptx::bar_sync(t < 32 ? 1 : 2, 64);  // each waits for the other
    ptx::bar_sync(t < 32 ? 2 : 1, 64);
  }
  if (kFault == 5) {  // two calls that are not the same
    if (t < 32)
      ptx::sync_threads();
    else
      ptx::sync_threads();
  }
  if (kFault == 6 && t < 32) ptx::bar_arrive(1, 96), ptx::bar_arrive(1, 96);  // twice in one phase
  ptx::st_global(out + t, ptx::ld_global(in + t));
}

// The number of rounds comes through shared memory: without the barrier it is garbage, and the loop
// has no end, as it has none without kEnds.
template <bool kEnds>
__global__ void rounds_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  if (t == 0) ptx::st_shared(shared, kEnds ? 3u : ~0u);
  ptx::sync_threads();
  uint32_t round = 0;
  while (ptx::ld_shared<uint32_t>(shared) != round) round = (round + 1) % 1024;
  ptx::st_global(out + t, static_cast<float>(round) + ptx::ld_global(in + t));
}

}  // namespace

const NamedKernels& mistakes() {
  static const NamedKernels all = {
      {"shared load out of bounds", &out_of_bounds_kernel<Fault::kSharedLoad>},
      {"shared store out of bounds", &out_of_bounds_kernel<Fault::kSharedStore>},
      {"global load out of bounds", &out_of_bounds_kernel<Fault::kGlobalLoad>},
      {"global store out of bounds", &out_of_bounds_kernel<Fault::kGlobalStore>},
      {"copy source out of bounds", &out_of_bounds_kernel<Fault::kCopySource>},
      {"copy target out of bounds", &out_of_bounds_kernel<Fault::kCopyTarget>},
      {"shared address without base", &out_of_bounds_kernel<Fault::kNoBase>},
      {"misaligned shared store", &misaligned_kernel<0>},
      {"misaligned global load", &misaligned_kernel<1>},
      {"misaligned copy source", &misaligned_kernel<2>},
      {"misaligned global store", &misaligned_kernel<3>},
      {"uninitialised shared", &uninitialised_kernel<0>},
      {"uninitialised half", &uninitialised_kernel<1>},
      {"uninitialised global", &uninitialised_kernel<2>},
      {"uninitialised ldmatrix", &uninitialised_kernel<3>},
      {"write input", &write_input_kernel},
      {"some lanes shuffle", &divergence_kernel<0>},
      {"lanes shuffle at two places", &divergence_kernel<1>},
      {"a lane has ended", &divergence_kernel<2>},
      {"lanes in different collectives", &divergence_kernel<3>},
      {"a warp never comes", &barrier_kernel<0>},
      {"barrier sizes differ", &barrier_kernel<1>},
      {"no such barrier", &barrier_kernel<2>},
      {"lanes name different barriers", &barrier_kernel<3>},
      {"warps wait for each other", &barrier_kernel<4>},
      {"different sync_threads", &barrier_kernel<5>},
      {"arrives twice", &barrier_kernel<6>},
      {"too tall a grid", &write_input_kernel},
      {"rounds", &rounds_kernel<true>},
      {"rounds without end", &rounds_kernel<false>},
  };
  return all;
}

}  // namespace internvl::selftest
