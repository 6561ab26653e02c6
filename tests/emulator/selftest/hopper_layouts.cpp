// wgmma and tensor copies with everything from outside: images of shared memory, descriptors,
// boxes; the tests write the documentation's formulas out for themselves.
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/wgmma_layout.cuh"
#include "selftest.h"

namespace internvl::selftest {
namespace {

struct WgmmaPlan {
  const ptx::U32x4* image;
  int image_parts;              // of 16 bytes
  uint64_t a, b;                // descriptors
  const uint32_t* a_registers;  // [128][4], or null
  float* d;                     // [128][N / 2], in and out
  int accumulate;
};

template <class T, int N, ptx::Major kA, ptx::Major kB>
__global__ void wgmma_kernel(const WgmmaPlan plan) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  for (int part = static_cast<int>(t); part < plan.image_parts; part += 128)
    ptx::st_shared(shared + 16 * part, ptx::ld_global(plan.image + part));
  ptx::fence_proxy_async_shared();
  ptx::sync_threads();
  float d[N / 2];
  uint32_t a[4] = {};
  for (int i = 0; i < N / 2; ++i) d[i] = ptx::ld_global(plan.d + N / 2 * t + i);
  for (int i = 0; i < 4 && plan.a_registers; ++i)
    a[i] = ptx::ld_global(plan.a_registers + 4 * t + i);
  ptx::wgmma_fence();
  if (plan.a_registers)
    ptx::wgmma_rs<T, N, kB>(d, a, {plan.b}, plan.accumulate != 0);
  else
    ptx::wgmma_ss<T, N, kA, kB>(d, {plan.a}, {plan.b}, plan.accumulate != 0);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  for (int i = 0; i < N / 2; ++i) ptx::st_global(plan.d + N / 2 * t + i, d[i]);
}

using WgmmaKernel = void (*)(WgmmaPlan);

template <class T, int N>
WgmmaKernel wgmma_kernel_of(bool a_mn, bool b_mn) {
  constexpr ptx::Major kK = ptx::Major::kK, kMN = ptx::Major::kMN;
  if (a_mn) return b_mn ? &wgmma_kernel<T, N, kMN, kMN> : &wgmma_kernel<T, N, kMN, kK>;
  return b_mn ? &wgmma_kernel<T, N, kK, kMN> : &wgmma_kernel<T, N, kK, kK>;
}

template <class T>
WgmmaKernel wgmma_kernel_of(int n, bool a_mn, bool b_mn) {
  switch (n) {
    case 8:
      return wgmma_kernel_of<T, 8>(a_mn, b_mn);
    case 80:
      return wgmma_kernel_of<T, 80>(a_mn, b_mn);
    case 128:
      return wgmma_kernel_of<T, 128>(a_mn, b_mn);
    default:
      return wgmma_kernel_of<T, 256>(a_mn, b_mn);
  }
}

struct CopyPlan {
  ptx::TensorMap map;
  ptx::U32x4* image;
  int parts, rank, store;
  int at[5];
};

// The box to shared memory and its bytes to the image as they lie there; or the other way round.
__global__ void copy_box_kernel(const INTERNVL_GRID_CONSTANT CopyPlan plan) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  const uint32_t barrier = shared, tile = shared + 1024;
  const int* at = plan.at;
  if (plan.store) {
    for (int part = static_cast<int>(t); part < plan.parts; part += 32)
      ptx::st_shared(tile + 16 * part, ptx::ld_global(plan.image + part));
    ptx::fence_proxy_async_shared();
    ptx::sync_warp();
    if (t > 0) return;
    if (plan.store == 2)
      ptx::tma_reduce_add_4d(&plan.map, tile, at[0], at[1], at[2], at[3]);
    else if (plan.rank == 4)
      ptx::tma_store_4d(&plan.map, tile, at[0], at[1], at[2], at[3]);
    else
      ptx::tma_store_5d(&plan.map, tile, at[0], at[1], at[2], at[3], at[4]);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
    return;
  }
  if (t == 0) {
    ptx::prefetch_tensor_map(&plan.map);
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, static_cast<uint32_t>(16 * plan.parts));
    if (plan.rank == 4)
      ptx::tma_load_4d(tile, &plan.map, at[0], at[1], at[2], at[3], barrier);
    else
      ptx::tma_load_5d(tile, &plan.map, at[0], at[1], at[2], at[3], at[4], barrier);
  }
  ptx::sync_warp();
  ptx::mbarrier_wait_parity(barrier, 0);
  for (int part = static_cast<int>(t); part < plan.parts; part += 32)
    ptx::st_global(plan.image + part, ptx::ld_shared<ptx::U32x4>(tile + 16 * part));
}

// 256 bytes there and back by copies of rows.
__global__ void copy_row_kernel(const uint8_t* src, uint8_t* dst) {
  const uint32_t shared = ptx::dynamic_shared();
  if (threadIdx.x > 0) return;
  ptx::mbarrier_init(shared, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_expect_tx(shared, 256);
  ptx::mbarrier_arrive(shared);
  ptx::bulk_load(shared + 16, src, 256, shared);
  while (!ptx::mbarrier_try_wait_parity(shared, 0)) {
  }
  ptx::bulk_store(dst, shared + 16, 256);
  ptx::bulk_commit_group();
  ptx::bulk_wait_group_read<0>();
}

template <class Tile>
PanelTileTable panel_tile_of() {
  PanelTileTable table;
  table.bytes = Tile::kBytes;
  for (int row = 0; row < Tile::kRows; ++row)
    for (int column = 0; column < Tile::kColumns; ++column)
      table.offsets.push_back(Tile::offset(row, column));
  for (int k = 0; k < Tile::kColumns; k += 16)
    for (int row = 0; row < Tile::kRows; row += 8)
      table.k_major.push_back(Tile::k_major(1024, row, k).bits);
  for (int k = 0; k < Tile::kRows; k += 16)
    for (int column = 0; column < Tile::kColumns; column += Tile::kPanel)
      table.mn_major.push_back(Tile::mn_major(1024, k, column).bits);
  return table;
}

}  // namespace

std::string run_wgmma(const WgmmaForm& form, uint64_t image, int image_bytes, uint64_t a_registers,
                      uint64_t d) {
  const WgmmaPlan plan{reinterpret_cast<const ptx::U32x4*>(image),
                       image_bytes / 16,
                       form.a,
                       form.b,
                       reinterpret_cast<const uint32_t*>(a_registers),
                       reinterpret_cast<float*>(d),
                       form.accumulate};
  const WgmmaKernel kernel = form.is_bf16
                                 ? wgmma_kernel_of<ptx::Bf16>(form.n, form.a_mn, form.b_mn)
                                 : wgmma_kernel_of<ptx::Fp16>(form.n, form.a_mn, form.b_mn);
  const ptx::LaunchConfig config{"wgmma_kernel", {1, 1, 1}, 128, image_bytes, nullptr};
  return ptx::launch(kernel, config, plan).error;
}

std::string run_copy_box(const BoxForm& form, uint64_t base, uint64_t image, int image_bytes) {
  ptx::TensorMapShape shape;
  shape.type = static_cast<ptx::TensorMapType>(form.type);
  shape.rank = static_cast<int>(form.sizes.size());
  shape.swizzle = static_cast<ptx::Swizzle>(form.swizzle);
  CopyPlan plan{};
  for (int i = 0; i < shape.rank && i < 5; ++i) {
    shape.sizes[i] = form.sizes[i];
    shape.box[i] = form.box[i];
    plan.at[i] = form.at[i];
    if (i > 0) shape.byte_strides[i - 1] = form.byte_strides[i - 1];
  }
  const LaunchStatus status =
      ptx::encode_tensor_map(reinterpret_cast<const void*>(base), shape, &plan.map);
  if (!status.ok()) return status.error;
  plan.image = reinterpret_cast<ptx::U32x4*>(image);
  plan.parts = image_bytes / 16;
  plan.rank = shape.rank;
  plan.store = form.store;
  const ptx::LaunchConfig config{"copy_box_kernel", {1, 1, 1}, 32, 1024 + image_bytes, nullptr};
  return ptx::launch(&copy_box_kernel, config, plan).error;
}

std::string run_copy_row(uint64_t src, uint64_t dst) {
  const ptx::LaunchConfig config{"copy_row_kernel", {1, 1, 1}, 32, 512, nullptr};
  return ptx::launch(&copy_row_kernel, config, reinterpret_cast<const uint8_t*>(src),
                     reinterpret_cast<uint8_t*>(dst))
      .error;
}

PanelTileTable panel_tile(int columns) {
  if (columns == 128) return panel_tile_of<tile::PanelTile<64, 128>>();
  if (columns == 96) return panel_tile_of<tile::PanelTile<64, 96>>();
  return panel_tile_of<tile::PanelTile<64, 48>>();
}

}  // namespace internvl::selftest
