// Compiled for compute capability 9.0, never launched: instantiates the functions of cuda/ptx/ that
// only Hopper has.
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace internvl::ptx_check {

struct Plan {
  ptx::TensorMap four, five;
};

template <class T, ptx::Major kMajor, int kRegisters>
__device__ void multiply_all_ways(float (&d)[kRegisters], ptx::MatrixDescriptor a,
                                  ptx::MatrixDescriptor b, uint32_t (&registers)[4]) {
  for (uint32_t& value : registers) ptx::fence_operand(value);
  for (float& value : d) ptx::fence_operand(value);
  ptx::wgmma_fence();
  ptx::wgmma_ss<T, 2 * kRegisters, kMajor, kMajor>(d, a, b, kMajor == ptx::Major::kMN);
  ptx::wgmma_rs<T, 2 * kRegisters, kMajor>(d, registers, ptx::advance(b, 32), true);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  for (float& value : d) ptx::fence_operand(value);
}

__device__ void copy_all_ways(const Plan& plan, const uint8_t* src, uint8_t* dst, uint32_t shared,
                              uint32_t barrier) {
  ptx::prefetch_tensor_map(&plan.four);
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_expect_tx(barrier, 4096);
  ptx::mbarrier_arrive_expect_tx(barrier, 8192);
  ptx::tma_load_4d(shared, &plan.four, 0, 1, 2, 3, barrier);
  ptx::tma_load_5d(shared, &plan.five, 0, 1, 2, 3, 4, barrier);
  ptx::bulk_load(shared, src, 4096, barrier);
  while (!ptx::mbarrier_try_wait_parity(barrier, 0)) {
  }
  ptx::mbarrier_wait_parity(barrier, 1);
  ptx::fence_proxy_async_shared();
  ptx::tma_store_4d(&plan.four, shared, 0, 1, 2, 3);
  ptx::tma_store_5d(&plan.five, shared, 0, 1, 2, 3, 4);
  ptx::tma_reduce_add_4d(&plan.four, shared, 0, 1, 2, 3);
  ptx::bulk_store(dst, shared, 4096);
  ptx::bulk_commit_group();
  ptx::bulk_wait_group_read<1>();
  ptx::bulk_wait_group<0>();
}

template <class T, int N>
__global__ void __launch_bounds__(256, 1)
    ptx_check_sm90_kernel(const INTERNVL_GRID_CONSTANT Plan plan, const uint8_t* src, uint8_t* dst,
                          float* sums) {
  const uint32_t shared = ptx::dynamic_shared(), barrier = shared + 65536;
  if (threadIdx.x == 0) copy_all_ways(plan, src, dst, shared, barrier);
  ptx::sync_threads();
  if (threadIdx.x < 128) {
    ptx::set_max_registers_dec<24>();
    ptx::cp_async_mbarrier_arrive_noinc(barrier);
    ptx::mbarrier_arrive(barrier);
    return;
  }
  ptx::set_max_registers_inc<240>();
  const ptx::MatrixDescriptor a = ptx::make_descriptor(shared, 16, 1024, ptx::Swizzle::k128);
  const ptx::MatrixDescriptor b =
      ptx::make_descriptor(shared + 32768, 128, 256, ptx::Swizzle::kNone);
  uint32_t registers[4] = {threadIdx.x, blockIdx.x, 0, 1};
  float d[N / 2] = {};
  multiply_all_ways<T, ptx::Major::kK>(d, a, b, registers);
  multiply_all_ways<T, ptx::Major::kMN>(d, a, b, registers);
  for (int i = 0; i < N / 2; ++i) sums[i * 128 + threadIdx.x] = d[i];
}

template <class T, int N>
LaunchStatus ptx_check_sm90(const Plan& plan, const uint8_t* src, uint8_t* dst, float* sums) {
  ptx::LaunchConfig config;
  config.name = "ptx_check_sm90_kernel";
  config.threads = 256;
  return ptx::launch(&ptx_check_sm90_kernel<T, N>, config, plan, src, dst, sums);
}

#define INTERNVL_CHECK(T, N) \
  template LaunchStatus ptx_check_sm90<ptx::T, N>(const Plan&, const uint8_t*, uint8_t*, float*);
INTERNVL_CHECK(Fp16, 8)
INTERNVL_CHECK(Bf16, 16)
INTERNVL_CHECK(Bf16, 32)
INTERNVL_CHECK(Bf16, 48)
INTERNVL_CHECK(Fp16, 64)
INTERNVL_CHECK(Bf16, 80)
INTERNVL_CHECK(Bf16, 96)
INTERNVL_CHECK(Bf16, 112)
INTERNVL_CHECK(Bf16, 128)
INTERNVL_CHECK(Bf16, 144)
INTERNVL_CHECK(Bf16, 160)
INTERNVL_CHECK(Bf16, 176)
INTERNVL_CHECK(Bf16, 192)
INTERNVL_CHECK(Bf16, 208)
INTERNVL_CHECK(Bf16, 224)
INTERNVL_CHECK(Bf16, 240)
INTERNVL_CHECK(Fp16, 256)
#undef INTERNVL_CHECK

}  // namespace internvl::ptx_check
