// One kernel per instruction: registers come from and go to global memory as they are, so that the
// tests compare them with the documentation's formulas.
#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "selftest.h"

namespace internvl::selftest {
namespace {

// a [32][4], b [32][2] registers; c, d [32][4] floats.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  uint32_t rA[4], rB[2];
  float rC[4];
  for (int i = 0; i < 4; ++i) rA[i] = ptx::ld_global(a + 4 * threadIdx.x + i);
  for (int i = 0; i < 2; ++i) rB[i] = ptx::ld_global(b + 2 * threadIdx.x + i);
  for (int i = 0; i < 4; ++i) rC[i] = ptx::ld_global(c + 4 * threadIdx.x + i);
  ptx::mma_m16n8k16<T>(rC, rA, rB, rC);
  for (int i = 0; i < 4; ++i) ptx::st_global(d + 4 * threadIdx.x + i, rC[i]);
}

// image: bytes of shared memory; rows [32]: offset of each lane's row; out [32][4].
__global__ void ldmatrix_kernel(const ptx::U32x4* image, int parts, const uint32_t* rows,
                                uint32_t* out, int matrices, int transposed) {
  const uint32_t shared = ptx::dynamic_shared();
  for (int part = threadIdx.x; part < parts; part += 32)
    ptx::st_shared(shared + 16 * part, ptx::ld_global(image + part));
  ptx::sync_warp();
  const uint32_t addr = shared + ptx::ld_global(rows + threadIdx.x);
  uint32_t r[4] = {}, r2[2] = {};
  if (matrices == 4 && transposed) ptx::ldmatrix_x4_trans(r, addr);
  if (matrices == 4 && !transposed) ptx::ldmatrix_x4(r, addr);
  if (matrices == 2 && transposed) ptx::ldmatrix_x2_trans(r2, addr);
  if (matrices == 2 && !transposed) ptx::ldmatrix_x2(r2, addr);
  for (int i = 0; i < matrices; ++i)
    ptx::st_global(out + 4 * threadIdx.x + i, matrices == 4 ? r[i] : r2[i % 2]);
}

// out [64][6]: bfly, idx, any, all, or over the block, and over the block.
__global__ void exchange_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t own = ptx::ld_global(in + threadIdx.x);
  uint32_t* row = out + 6 * threadIdx.x;
  ptx::st_global(row, ptx::shfl_bfly(own, 5));
  ptx::st_global(row + 1, ptx::shfl_idx(own, static_cast<int>(own)));
  ptx::st_global(row + 2, uint32_t{ptx::vote_any(own == 3)});
  ptx::st_global(row + 3, uint32_t{ptx::vote_all(own < 40)});
  ptx::st_global(row + 4, uint32_t{ptx::sync_threads_or(own == 3)});
  ptx::st_global(row + 5, uint32_t{ptx::sync_threads_and(own < 40)});
}

__global__ void math_kernel(const float* x, float* y, int n, int function) {
  for (int i = threadIdx.x; i < n; i += 32) {
    const float v = ptx::ld_global(x + i);
    float r = 0;
    if (function == 0) r = ptx::ex2(v);
    if (function == 1) r = ptx::lg2(v);
    if (function == 2) r = ptx::rcp(v);
    if (function == 3) r = ptx::rsqrt(v);
    if (function == 4) r = ptx::fma(v, v, ptx::ld_global(x + n - 1 - i));
    if (function == 5) r = ptx::to_float<ptx::Bf16>(ptx::to_bits<ptx::Bf16>(v));
    if (function == 6) r = ptx::to_float<ptx::Fp16>(ptx::to_bits<ptx::Fp16>(v));
    ptx::st_global(y + i, r);
  }
}

// Every width of load and store, global to shared and back.
template <class T>
__global__ void copy_kernel(const T* src, T* dst) {
  const uint32_t at = ptx::dynamic_shared() + sizeof(T) * threadIdx.x;
  ptx::st_shared(at, ptx::ld_global_nc(src + threadIdx.x));
  ptx::st_global(dst + threadIdx.x, ptx::ld_shared<T>(at));
}

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

std::string run_mma(bool is_bf16, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  const ptx::LaunchConfig config{"mma_kernel", {}, 32, 0, nullptr};
  return ptx::launch(is_bf16 ? &mma_kernel<ptx::Bf16> : &mma_kernel<ptx::Fp16>, config,
                     at<const uint32_t>(a), at<const uint32_t>(b), at<const float>(c), at<float>(d))
      .error;
}

std::string run_ldmatrix(uint64_t image, int bytes, uint64_t rows, uint64_t out, int matrices,
                         bool transposed) {
  const ptx::LaunchConfig config{"ldmatrix_kernel", {}, 32, bytes, nullptr};
  return ptx::launch(&ldmatrix_kernel, config, at<const ptx::U32x4>(image), bytes / 16,
                     at<const uint32_t>(rows), at<uint32_t>(out), matrices, int{transposed})
      .error;
}

std::string run_exchange(uint64_t in, uint64_t out) {
  const ptx::LaunchConfig config{"exchange_kernel", {}, 64, 0, nullptr};
  return ptx::launch(&exchange_kernel, config, at<const uint32_t>(in), at<uint32_t>(out)).error;
}

std::string run_math(uint64_t x, uint64_t y, int n, int function) {
  const ptx::LaunchConfig config{"math_kernel", {}, 32, 0, nullptr};
  return ptx::launch(&math_kernel, config, at<const float>(x), at<float>(y), n, function).error;
}

std::string run_copy(int bytes, uint64_t src, uint64_t dst) {
  const ptx::LaunchConfig config{"copy_kernel", {}, 64, 1024, nullptr};
  switch (bytes) {
    case 1:
      return ptx::launch(&copy_kernel<uint8_t>, config, at<const uint8_t>(src), at<uint8_t>(dst))
          .error;
    case 2:
      return ptx::launch(&copy_kernel<uint16_t>, config, at<const uint16_t>(src), at<uint16_t>(dst))
          .error;
    case 4:
      return ptx::launch(&copy_kernel<float>, config, at<const float>(src), at<float>(dst)).error;
    case 8:
      return ptx::launch(&copy_kernel<ptx::F32x2>, config, at<const ptx::F32x2>(src),
                         at<ptx::F32x2>(dst))
          .error;
    default:
      return ptx::launch(&copy_kernel<ptx::U32x4>, config, at<const ptx::U32x4>(src),
                         at<ptx::U32x4>(dst))
          .error;
  }
}

}  // namespace internvl::selftest
