// Small kernels that are right, and the same ones with one mistake each.
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/warp.cuh"
#include "named.h"
#include "selftest.h"

namespace internvl::selftest {
namespace {

// out[t] = in[63 - t] through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  ptx::st_shared(shared + 4 * t, ptx::ld_global(in + t));
  if (kBarrier) ptx::sync_threads();
  ptx::st_global(out + t, ptx::ld_shared<float>(shared + 4 * (63 - t)));
}

// The same inside of each warp.
template <bool kBarrier>
__global__ void reverse_in_warp_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  ptx::st_shared(shared + 4 * t, ptx::ld_global(in + t));
  if (kBarrier) ptx::sync_warp();
  ptx::st_global(out + t, ptx::ld_shared<float>(shared + 4 * (t ^ 31)));
}

// Two rounds through one buffer: the second may not overwrite what others still read.
template <bool kBarrier>
__global__ void two_rounds_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    if (kBarrier && round) ptx::sync_threads();
    ptx::st_shared(shared + 4 * t, ptx::ld_global(in + 64 * round + t));
    ptx::sync_threads();
    ptx::st_global(out + 64 * round + t, ptx::ld_shared<float>(shared + 4 * (63 - t)));
  }
}

// Both warps write the same words.
__global__ void write_twice_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  ptx::st_shared(shared + 4 * (t % 32), ptx::ld_global(in + t));
  ptx::sync_threads();
  ptx::st_global(out + t, ptx::ld_shared<float>(shared + 4 * (t % 32)));
}

// What an ldmatrix has read is overwritten by other lanes.
template <bool kBarrier>
__global__ void overwrite_ldmatrix_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared() + 512 * (threadIdx.x / 32), t = threadIdx.x % 32;
  uint32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (kBarrier && round) ptx::sync_warp();
    ptx::st_shared(shared + 16 * t, ptx::U32x4{t, t, t, t});
    ptx::sync_warp();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, shared + 16 * t);
    sum += r[0] + r[1] + r[2] + r[3];
  }
  ptx::st_global(out + threadIdx.x, static_cast<float>(sum) + ptx::ld_global(in));
}

enum class Wait { kRight, kNone, kTooFew, kNoCommit, kNoBarrier, kAfterBarrier };

// Four stages of 64 floats, two in flight, each read by the other warp.
template <Wait kWait>
__global__ void pipeline_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  const auto issue = [&](int stage) {
    if (t < 16 && stage < 4)
      ptx::cp_async_cg_16(shared + 256 * (stage % 2) + 16 * t, in + 64 * stage + 4 * t, 16);
    if (kWait != Wait::kNoCommit) ptx::cp_async_commit_group();
  };
  issue(0);
  issue(1);
  for (int stage = 0; stage < 4; ++stage) {
    if (kWait == Wait::kTooFew) ptx::cp_async_wait_group<2>();
    if (kWait == Wait::kAfterBarrier) ptx::sync_threads();
    if (kWait != Wait::kNone && kWait != Wait::kTooFew) ptx::cp_async_wait_group<1>();
    if (kWait != Wait::kNoBarrier && kWait != Wait::kAfterBarrier) ptx::sync_threads();
    ptx::st_global(out + 64 * stage + t,
                   ptx::ld_shared<float>(shared + 256 * (stage % 2) + 4 * (63 - t)));
    ptx::sync_threads();
    issue(stage + 2);
  }
}

// A stage is refilled while the other warp may still be reading it.
template <bool kBarrier>
__global__ void refill_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    if (t < 16) ptx::cp_async_cg_16(shared + 16 * t, in + 64 * round + 4 * t, 16);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::sync_threads();
    ptx::st_global(out + 64 * round + t, ptx::ld_shared<float>(shared + 4 * (63 - t)));
    if (kBarrier) ptx::sync_threads();
  }
}

// Partial copies fill up with zeros.
__global__ void zero_fill_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  ptx::cp_async_cg_16(shared + 16 * t, in + 4 * t, static_cast<int>(t % 17));
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  for (uint32_t i = 0; i < 4; ++i)
    ptx::st_global(out + 4 * t + i, ptx::ld_shared<float>(shared + 16 * t + 4 * i));
}

// Warp 0 fills for warp 1, over named barriers: 1 = full, 2 = empty.
template <bool kFull, bool kEmpty>
__global__ void producer_consumer_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), lane = threadIdx.x % 32;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x < 32) {
      if (kEmpty && round) ptx::bar_sync(2, 64);
      ptx::st_shared(shared + 4 * lane, ptx::ld_global(in + 32 * round + lane));
      if (kFull) ptx::bar_arrive(1, 64);
    } else {
      if (kFull) ptx::bar_sync(1, 64);
      ptx::st_global(out + 32 * round + lane, ptx::ld_shared<float>(shared + 4 * (31 - lane)));
      if (kEmpty && round < 3) ptx::bar_arrive(2, 64);
    }
  }
}

// Four blocks write partial sums; the last one to arrive adds them up.
template <bool kBarrier>
__global__ void last_block_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x, b = blockIdx.x;
  float* partial = out + 64;
  if (t < 32) ptx::st_global(partial + 32 * b + t, ptx::ld_global(in + 32 * b + t));
  if (kBarrier) ptx::sync_threads();
  if (t == 0) ptx::st_shared(shared, ptx::atom_add_global(counter, 1));
  ptx::sync_threads();
  if (ptx::ld_shared<uint32_t>(shared) != gridDim.x - 1 || t >= 32) return;
  float sum = 0;
  for (uint32_t other = 0; other < gridDim.x; ++other)
    sum += ptx::ld_global(partial + 32 * other + t);
  ptx::st_global(out + t, sum);
}

// Blocks that exchange data without any order.
__global__ void other_block_kernel(KERNEL_ARGUMENTS) {
  const uint32_t t = threadIdx.x;
  ptx::st_global(out + 64 * blockIdx.x + t, ptx::ld_global(in + t));
  if (blockIdx.x > 0) ptx::st_global(out + 64 * (blockIdx.x - 1) + t, 1.0f);
}

// Threads of a block that exchange data through global memory.
template <bool kBarrier>
__global__ void through_global_kernel(KERNEL_ARGUMENTS) {
  const uint32_t t = threadIdx.x;
  ptx::st_global(out + t, ptx::ld_global(in + t));
  if (kBarrier) ptx::sync_threads();
  ptx::st_global(out + 64 + t, ptx::ld_global(static_cast<const float*>(out) + 63 - t));
}

// What the kernel itself writes is read by ld.global.nc.
__global__ void read_as_unchanging_kernel(KERNEL_ARGUMENTS) {
  const uint32_t t = threadIdx.x;
  ptx::st_global(out + t, ptx::ld_global(in + t));
  ptx::sync_threads();
  ptx::st_global(out + 64 + t, ptx::ld_global_nc(static_cast<const float*>(out) + 63 - t));
}

// Two-byte neighbours in one word, written and read by different threads: nothing is wrong.
__global__ void halves_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  ptx::st_shared(shared + 2 * t, static_cast<uint16_t>(t));
  const float own = ptx::ld_shared<uint16_t>(shared + 2 * t);
  ptx::st_shared(shared + 2 * t, static_cast<uint16_t>(t + 1));
  ptx::st_global(out + t, own + ptx::ld_global(in));
}

// Columns of a 32 x 32 tile of floats: kPitch 32 meets one bank, 33 meets all.
template <int kPitch>
__global__ void columns_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), lane = threadIdx.x % 32;
  if (threadIdx.x >= 32) return;
  ptx::st_shared(shared + 4 * kPitch * lane, ptx::ld_global(in + lane));
  ptx::sync_warp();
  ptx::st_global(out + lane, ptx::ld_shared<float>(shared + 4 * kPitch * lane));
}

// Rows of 128 bytes, read by ldmatrix: eight-fold conflicts, or none with a swizzle.
template <bool kSwizzle>
__global__ void rows_kernel(KERNEL_ARGUMENTS) {
  const uint32_t shared = ptx::dynamic_shared(), lane = threadIdx.x % 32;
  if (threadIdx.x >= 32) return;
  const auto place = [&](uint32_t row, uint32_t chunk) {
    return shared + 128 * row + 16 * (kSwizzle ? chunk ^ (row % 8) : chunk);
  };
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t part = 32 * i + lane;
    ptx::st_shared(place(part / 8, part % 8), ptx::U32x4{part, part, part, part});
  }
  ptx::sync_warp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, place(lane, 3));
  ptx::st_global(out + lane, static_cast<float>(r[0]) + ptx::ld_global(in));
}

// A store of one float per 128 bytes, and one of neighbours.
__global__ void sectors_kernel(KERNEL_ARGUMENTS) {
  const uint32_t t = threadIdx.x;
  const float v = ptx::ld_global(in + t);
  if (t < 8) ptx::st_global(out + 32 * t, v);
  if (t >= 32) ptx::st_global(out + 1 + (t - 32) % 31 + 32 * (t == 63), v);
}

const NamedKernels& protocols() {
  static const NamedKernels all = {
      {"reverse", &reverse_kernel<true>},
      {"reverse no barrier", &reverse_kernel<false>},
      {"reverse in warp", &reverse_in_warp_kernel<true>},
      {"reverse in warp no barrier", &reverse_in_warp_kernel<false>},
      {"two rounds", &two_rounds_kernel<true>},
      {"two rounds no barrier", &two_rounds_kernel<false>},
      {"write twice", &write_twice_kernel},
      {"overwrite ldmatrix", &overwrite_ldmatrix_kernel<true>},
      {"overwrite ldmatrix no barrier", &overwrite_ldmatrix_kernel<false>},
      {"pipeline", &pipeline_kernel<Wait::kRight>},
      {"pipeline no wait", &pipeline_kernel<Wait::kNone>},
      {"pipeline waits too little", &pipeline_kernel<Wait::kTooFew>},
      {"pipeline no commit", &pipeline_kernel<Wait::kNoCommit>},
      {"pipeline no barrier", &pipeline_kernel<Wait::kNoBarrier>},
      {"pipeline waits after barrier", &pipeline_kernel<Wait::kAfterBarrier>},
      {"read as unchanging", &read_as_unchanging_kernel},
      {"refill", &refill_kernel<true>},
      {"refill no barrier", &refill_kernel<false>},
      {"zero fill", &zero_fill_kernel},
      {"producer consumer", &producer_consumer_kernel<true, true>},
      {"producer consumer no full", &producer_consumer_kernel<false, true>},
      {"producer consumer no empty", &producer_consumer_kernel<true, false>},
      {"last block", &last_block_kernel<true>},
      {"last block no barrier", &last_block_kernel<false>},
      {"other block", &other_block_kernel},
      {"through global", &through_global_kernel<true>},
      {"through global no barrier", &through_global_kernel<false>},
      {"halves", &halves_kernel},
      {"columns", &columns_kernel<33>},
      {"columns in one bank", &columns_kernel<32>},
      {"rows swizzled", &rows_kernel<true>},
      {"rows in one bank", &rows_kernel<false>},
      {"sectors", &sectors_kernel},
  };
  return all;
}

}  // namespace

std::string run_named(const std::string& name, uint64_t in, uint64_t out, uint64_t counter) {
  const NamedKernels& kernels = protocols().count(name) ? protocols() : mistakes();
  const auto found = kernels.find(name);
  if (found == kernels.end()) return "no kernel of this name";
  const unsigned blocks = name.find(" block") == std::string::npos ? 1 : 4;
  const unsigned height = name == "too tall a grid" ? 65536 : 1;
  const int threads = name == "arrives twice" ? 96 : 64;
  const ptx::LaunchConfig config{found->first.c_str(), {blocks, height, 1}, threads, 4096, nullptr};
  return ptx::launch(found->second, config, reinterpret_cast<const float*>(in),
                     reinterpret_cast<float*>(out), reinterpret_cast<uint32_t*>(counter))
      .error;
}

}  // namespace internvl::selftest
