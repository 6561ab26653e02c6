// Compiled, never launched: instantiates every function of cuda/ptx/ for the device.
#include "cuda/device_info.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"

namespace internvl::ptx_check {

template <class T>
__device__ void copy_all_ways(const T* src, T* dst, uint32_t shared) {
  ptx::st_shared(shared, ptx::ld_global(src));
  ptx::st_shared(shared + 16, ptx::ld_global_nc(src + 1));
  ptx::sync_threads();
  ptx::st_global(dst, ptx::ld_shared<T>(shared + 16));
}

template <class T>
__global__ void __launch_bounds__(128)
    ptx_check_kernel(const uint8_t* src, uint8_t* dst, float* sums, uint32_t* counter) {
  const uint32_t shared = ptx::dynamic_shared();
  copy_all_ways(src, dst, shared);
  copy_all_ways(reinterpret_cast<const uint16_t*>(src), reinterpret_cast<uint16_t*>(dst), shared);
  copy_all_ways(reinterpret_cast<const float*>(src), reinterpret_cast<float*>(dst), shared);
  copy_all_ways(reinterpret_cast<const ptx::F32x2*>(src), reinterpret_cast<ptx::F32x2*>(dst),
                shared);
  copy_all_ways(reinterpret_cast<const ptx::U32x4*>(src), reinterpret_cast<ptx::U32x4*>(dst),
                shared);

  ptx::cp_async_cg_16(shared + 16 * threadIdx.x, src + 16 * threadIdx.x, 16);
  ptx::cp_async_ca_8(shared + 4096 + 8 * threadIdx.x, src, 5);
  ptx::cp_async_ca_4(shared + 8192 + 4 * threadIdx.x, src, 0);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  ptx::bar_arrive(1, 128);
  ptx::bar_sync(2, 128);

  uint32_t a[4], b[2];
  float c[4] = {};
  ptx::ldmatrix_x4(a, shared + 16 * (threadIdx.x % 32));
  ptx::ldmatrix_x2(b, shared + 16 * (threadIdx.x % 16));
  ptx::mma_m16n8k16<T>(c, a, b, c);
  ptx::ldmatrix_x4_trans(a, shared + 16 * (threadIdx.x % 32));
  ptx::ldmatrix_x2_trans(b, shared + 16 * (threadIdx.x % 16));
  ptx::mma_m16n8k16<T>(c, a, b, c);

  const ptx::F32x2 pair = ptx::unpack2<T>(ptx::pack2<T>(ptx::ex2(c[0]), ptx::lg2(c[1])));
  float sum = ptx::fma(pair.x, ptx::rcp(pair.y), ptx::rsqrt(c[2]));
  sum = ptx::fmax(sum, ptx::fmin(c[3], ptx::to_float<T>(ptx::to_bits<T>(sum))));
  sum += ptx::shfl_bfly(sum, 1) + ptx::shfl_idx(sum, 0);
  if (ptx::vote_any(sum > 0) && !ptx::vote_all(sum > 1)) sum += 1;
  if (ptx::sync_threads_or(sum > 2) && ptx::sync_threads_and(sum > 3)) sum += 1;
  ptx::sync_warp();
  ptx::fence_acq_rel_gpu();
  if (ptx::atom_add_global(counter, 1) == 0) ptx::st_global(sums + threadIdx.x, sum);
}

template <class T>
LaunchStatus ptx_check(const uint8_t* src, uint8_t* dst, float* sums, uint32_t* counter) {
  ptx::LaunchConfig config;
  config.name = "ptx_check_kernel";
  config.threads = 128;
  config.shared_bytes = 16384;
  return ptx::launch(&ptx_check_kernel<T>, config, src, dst, sums, counter);
}

template LaunchStatus ptx_check<ptx::Bf16>(const uint8_t*, uint8_t*, float*, uint32_t*);
template LaunchStatus ptx_check<ptx::Fp16>(const uint8_t*, uint8_t*, float*, uint32_t*);

}  // namespace internvl::ptx_check
