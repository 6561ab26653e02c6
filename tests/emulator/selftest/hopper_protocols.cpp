// A small matrix product the Hopper way: a warp that issues tensor copies, a warpgroup that
// multiplies two stages in turn, a result that leaves by a tensor copy; right, and with one mistake
// each. out [64, 64] = a [64, 256] * b [64, 256]^T, all bf16.
#include <map>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/ptx/sync.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/wgmma_layout.cuh"
#include "selftest.h"

namespace internvl::selftest {
namespace {

using ptx::Bf16;
using Tile = tile::PanelTile<64, 64>;

constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;
constexpr int kSteps = 4;
constexpr int kStages = 2;
constexpr uint32_t kStageBytes = 2 * Tile::kBytes;
constexpr uint32_t kStaging = kStages * kStageBytes;
constexpr uint32_t kBarriers = kStaging + Tile::kBytes;  // full [2], empty [2]
constexpr uint32_t kSharedBytes = kBarriers + 64;

enum class Mistake {
  kNone,
  // of the barriers
  kNoFullWait,
  kWrongParity,
  kNoEmptyWait,
  kReleaseEarly,
  kNoInitFence,
  kNoInitBarrier,
  kNeverInitialised,
  kExpectLess,
  kExpectMore,
  kExpectHuge,
  kArriveTwice,
  kInitAgain,
  kStoreOverBarrier,
  // of the products
  kNoProductWait,
  kWaitTooLittle,
  kNoCommit,
  kNoFence,
  kTouchAccumulators,
  kReadAccumulators,
  kOtherLine,
  kOneWarpMissing,
  kShiftedDescriptor,
  kOverwriteOperand,
  // of the way out
  kNoProxyFence,
  kNoStoreBarrier,
  kNoStoreWait,
  kOverwriteStaging,
  kNotATensorMap,
  kOutOfShared,
};

struct Plan {
  ptx::TensorMap a, b, out;
  const uint8_t* rows_a;  // for the copies by threads
};

INTERNVL_PTX_FN uint32_t full(uint32_t stage) {
  return ptx::dynamic_shared() + kBarriers + 8 * stage;
}
INTERNVL_PTX_FN uint32_t empty(uint32_t stage) { return full(kStages + stage); }

template <Mistake kMistake>
INTERNVL_PTX_FN void init_barriers(uint32_t empty_arrivals) {
  if (threadIdx.x == 0 && kMistake != Mistake::kNeverInitialised) {
    for (uint32_t stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), empty_arrivals);
    }
    if (kMistake != Mistake::kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (kMistake != Mistake::kNoInitBarrier) ptx::sync_threads();
}

// kTransposed: k runs along the rows of both tensors.
template <Mistake kMistake, bool kTransposed = false>
INTERNVL_PTX_FN void produce(const Plan& plan) {
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t stage = step % kStages, parity = step / kStages & 1;
    if (kMistake != Mistake::kNoEmptyWait) ptx::mbarrier_wait_parity(empty(stage), parity ^ 1);
    const uint32_t bytes = kMistake == Mistake::kExpectLess   ? kStageBytes / 2
                           : kMistake == Mistake::kExpectMore ? kStageBytes + 16
                           : kMistake == Mistake::kExpectHuge ? (1u << 20)
                                                              : kStageBytes;
    ptx::mbarrier_arrive_expect_tx(full(stage), bytes);
    if (kMistake == Mistake::kArriveTwice) ptx::mbarrier_arrive(full(stage));
    const uint32_t tile = ptx::dynamic_shared() + stage * kStageBytes;
    const uint32_t beyond = kMistake == Mistake::kOutOfShared ? kSharedBytes / 128 * 128 : 0;
    const ptx::TensorMap* map_a = kMistake == Mistake::kNotATensorMap
                                      ? reinterpret_cast<const ptx::TensorMap*>(plan.rows_a)
                                      : &plan.a;
    const int column = kTransposed ? 0 : 64 * step, row = kTransposed ? 64 * step : 0;
    ptx::tma_load_4d(tile + beyond, map_a, column, row, 0, 0, full(stage));
    ptx::tma_load_4d(tile + Tile::kBytes, &plan.b, column, row, 0, 0, full(stage));
  }
}

// One stage's product: [64, 64] of k.
template <Mistake kMistake>
INTERNVL_PTX_FN void multiply_stage(float (&d)[32], uint32_t stage, bool accumulate) {
  const uint32_t tile = ptx::dynamic_shared() + stage * kStageBytes;
  for (float& value : d) ptx::fence_operand(value);
  if (kMistake != Mistake::kNoFence) ptx::wgmma_fence();
  for (int k = 0; k < 64; k += 16) {
    ptx::MatrixDescriptor a = Tile::k_major(tile, 0, k);
    const ptx::MatrixDescriptor b = Tile::k_major(tile + Tile::kBytes, 0, k);
    if (kMistake == Mistake::kShiftedDescriptor) a = ptx::advance(a, 128);
    if (kMistake == Mistake::kOneWarpMissing && threadIdx.x / 32 == 2) continue;
    constexpr ptx::Major kK = ptx::Major::kK;
    if (kMistake == Mistake::kOtherLine && threadIdx.x / 32 == 1)
      ptx::wgmma_ss<Bf16, 64, kK, kK>(d, a, b, accumulate || k > 0);
    else
      ptx::wgmma_ss<Bf16, 64, kK, kK>(d, a, b, accumulate || k > 0);
  }
  if (kMistake != Mistake::kNoCommit) ptx::wgmma_commit_group();
}

template <Mistake kMistake>
INTERNVL_PTX_FN void multiply(float (&d)[32]) {
  const bool elected = threadIdx.x == 0;
  float early = 0;
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t stage = step % kStages, parity = step / kStages & 1;
    if (kMistake != Mistake::kNoFullWait)
      ptx::mbarrier_wait_parity(full(stage), parity ^ (kMistake == Mistake::kWrongParity));
    if (kMistake == Mistake::kInitAgain && elected && step == 0) ptx::mbarrier_init(full(0), 1);
    if (kMistake == Mistake::kStoreOverBarrier && elected) ptx::st_shared(empty(1), 0u);
    multiply_stage<kMistake>(d, stage, step > 0);
    if (kMistake == Mistake::kReleaseEarly && elected) ptx::mbarrier_arrive(empty(stage));
    if (kMistake == Mistake::kTouchAccumulators) d[3] = 0;
    if (kMistake == Mistake::kReadAccumulators) early = d[3];
    if (kMistake == Mistake::kOverwriteOperand && elected)
      ptx::st_shared(ptx::dynamic_shared() + stage * kStageBytes, 0u);
    if (kMistake == Mistake::kWaitTooLittle)
      ptx::wgmma_wait_group<1>();
    else if (kMistake != Mistake::kNoProductWait)
      ptx::wgmma_wait_group<0>();
    if (kMistake != Mistake::kReleaseEarly && elected) ptx::mbarrier_arrive(empty(stage));
  }
  if (kMistake == Mistake::kReadAccumulators) d[3] = early;
  for (float& value : d) ptx::fence_operand(value);
}

// Accumulators to the staging tile, from there to memory.
template <Mistake kMistake>
INTERNVL_PTX_FN void write_out(const Plan& plan, const float (&d)[32]) {
  const uint32_t staging = ptx::dynamic_shared() + kStaging;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);
  for (int i = 0; i < 8; ++i) {
    ptx::st_shared(staging + Tile::offset(row, 8 * i) + 2 * column,
                   ptx::pack2<Bf16>(d[4 * i], d[4 * i + 1]));
    ptx::st_shared(staging + Tile::offset(row + 8, 8 * i) + 2 * column,
                   ptx::pack2<Bf16>(d[4 * i + 2], d[4 * i + 3]));
  }
  if (kMistake != Mistake::kNoProxyFence) ptx::fence_proxy_async_shared();
  if (kMistake != Mistake::kNoStoreBarrier) ptx::bar_sync(1, kConsumers);
  if (threadIdx.x == 0) {
    ptx::tma_store_4d(&plan.out, staging, 0, 0, 0, 0);
    ptx::bulk_commit_group();
    if (kMistake == Mistake::kOverwriteStaging) ptx::st_shared(staging, 0u);
    if (kMistake != Mistake::kNoStoreWait) ptx::bulk_wait_group_read<0>();
  }
}

template <Mistake kMistake>
__global__ void product_kernel(const INTERNVL_GRID_CONSTANT Plan plan) {
  init_barriers<kMistake>(1);
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) produce<kMistake>(plan);
    return;
  }
  float d[32] = {};
  multiply<kMistake>(d);
  write_out<kMistake>(plan, d);
}

// Threads copy the rows of A themselves (cp.async), one warp of them; their copies arrive. The
// product's A comes from registers or from shared memory.
enum class Copies { kRight, kNoReaderFence, kNoArrival, kReleaseUnread, kFromRegisters, kTouchA };

template <Copies kCopies>
__global__ void copies_kernel(const INTERNVL_GRID_CONSTANT Plan plan) {
  constexpr bool kRegisters = kCopies == Copies::kFromRegisters || kCopies == Copies::kTouchA ||
                              kCopies == Copies::kReleaseUnread;
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(full(0), 33);
    ptx::mbarrier_init(empty(0), 4);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  float d[32] = {};
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t parity = step & 1;
    if (t >= kConsumers) {
      const int lane = static_cast<int>(t) - kConsumers;
      ptx::mbarrier_wait_parity(empty(0), parity ^ 1);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect_tx(full(0), Tile::kBytes);
        ptx::tma_load_4d(shared + Tile::kBytes, &plan.b, 64 * step, 0, 0, 0, full(0));
      }
      for (int part = lane; part < 64 * 8; part += 32)
        ptx::cp_async_cg_16(shared + Tile::offset(part / 8, part % 8 * 8),
                            plan.rows_a + part / 8 * 512 + 128 * step + part % 8 * 16, 16);
      if (kCopies == Copies::kNoArrival)
        ptx::mbarrier_arrive(full(0));
      else
        ptx::cp_async_mbarrier_arrive_noinc(full(0));
      continue;
    }
    ptx::mbarrier_wait_parity(full(0), parity);
    if (kCopies == Copies::kRight) ptx::fence_proxy_async_shared();
    uint32_t a[4][4] = {};
    const int row = static_cast<int>(t / 32 * 16 + t % 32 / 4),
              column = static_cast<int>(t % 4) * 2;
    for (int i = 0; i < 16 && kRegisters; ++i)
      a[i / 4][i % 4] = ptx::ld_shared<uint32_t>(
          shared + Tile::offset(row + 8 * (i % 2), i / 2 * 8) + 2 * column);
    ptx::wgmma_fence();
    for (int k = 0; k < 64; k += 16) {
      const ptx::MatrixDescriptor b = Tile::k_major(shared + Tile::kBytes, 0, k);
      constexpr ptx::Major kK = ptx::Major::kK;
      if (kRegisters)
        ptx::wgmma_rs<Bf16, 64, kK>(d, a[k / 16], b, true);
      else
        ptx::wgmma_ss<Bf16, 64, kK, kK>(d, Tile::k_major(shared, 0, k), b, true);
    }
    ptx::wgmma_commit_group();
    if (kCopies == Copies::kTouchA) a[1][2] ^= 1;
    ptx::wgmma_wait_group<0>();
    if (kRegisters && kCopies != Copies::kReleaseUnread) ptx::sync_warp();
    if (t % 32 == 0) ptx::mbarrier_arrive(empty(0));
  }
  if (t < kConsumers) write_out<Mistake::kNone>(plan, d);
}

// a [256, 64] and b [256, 64] with k along the rows: out = a^T * b, both operands MN-major. One
// thread waits for all, all arrive.
__global__ void transposed_kernel(const INTERNVL_GRID_CONSTANT Plan plan) {
  const uint32_t shared = ptx::dynamic_shared(), t = threadIdx.x;
  init_barriers<Mistake::kNone>(kConsumers);
  if (t >= kConsumers) {
    if (t == kConsumers) produce<Mistake::kNone, true>(plan);
    return;
  }
  float d[32] = {};
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t stage = step % kStages, parity = step / kStages & 1;
    if (t == 0) ptx::mbarrier_wait_parity(full(stage), parity);
    ptx::bar_sync(1, kConsumers);
    ptx::wgmma_fence();
    for (int k = 0; k < 64; k += 16) {
      constexpr ptx::Major kMN = ptx::Major::kMN;
      const uint32_t tile = shared + stage * kStageBytes;
      ptx::wgmma_ss<Bf16, 64, kMN, kMN>(d, Tile::mn_major(tile, k, 0),
                                        Tile::mn_major(tile + Tile::kBytes, k, 0), true);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::mbarrier_arrive(empty(stage));
  }
  write_out<Mistake::kNone>(plan, d);
}

enum class Registers { kRight, kSomeWarps, kMoreThanAtLaunch, kWrongWay, kDiffer };

template <Registers kRegisters>
__global__ void registers_kernel(const INTERNVL_GRID_CONSTANT Plan) {
  const uint32_t warp = threadIdx.x / 32;
  if (warp < 4) {
    if (kRegisters == Registers::kWrongWay)
      ptx::set_max_registers_dec<200>();
    else if (kRegisters == Registers::kMoreThanAtLaunch)
      ptx::set_max_registers_dec<32>();  // 65536 of 65536, but a launch gives 384 * 168
    else if (kRegisters == Registers::kDiffer && warp == 3)
      ptx::set_max_registers_dec<32>();
    else if (kRegisters != Registers::kSomeWarps || warp < 3)
      ptx::set_max_registers_dec<24>();
  } else {
    ptx::set_max_registers_inc<240>();
  }
}

using Kernel = void (*)(Plan);

const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
      {"product", &product_kernel<Mistake::kNone>},
      {"no wait for full", &product_kernel<Mistake::kNoFullWait>},
      {"wrong parity", &product_kernel<Mistake::kWrongParity>},
      {"no wait for empty", &product_kernel<Mistake::kNoEmptyWait>},
      {"release early", &product_kernel<Mistake::kReleaseEarly>},
      {"no init fence", &product_kernel<Mistake::kNoInitFence>},
      {"no barrier after init", &product_kernel<Mistake::kNoInitBarrier>},
      {"never initialised", &product_kernel<Mistake::kNeverInitialised>},
      {"expect less", &product_kernel<Mistake::kExpectLess>},
      {"expect more", &product_kernel<Mistake::kExpectMore>},
      {"expect too many bytes", &product_kernel<Mistake::kExpectHuge>},
      {"arrive twice", &product_kernel<Mistake::kArriveTwice>},
      {"init again", &product_kernel<Mistake::kInitAgain>},
      {"store over barrier", &product_kernel<Mistake::kStoreOverBarrier>},
      {"no wait for products", &product_kernel<Mistake::kNoProductWait>},
      {"wait too little", &product_kernel<Mistake::kWaitTooLittle>},
      {"no commit", &product_kernel<Mistake::kNoCommit>},
      {"no wgmma fence", &product_kernel<Mistake::kNoFence>},
      {"touch accumulators", &product_kernel<Mistake::kTouchAccumulators>},
      {"read accumulators", &product_kernel<Mistake::kReadAccumulators>},
      {"wgmma at another line", &product_kernel<Mistake::kOtherLine>},
      {"one warp missing", &product_kernel<Mistake::kOneWarpMissing>},
      {"shifted descriptor", &product_kernel<Mistake::kShiftedDescriptor>},
      {"overwrite operand", &product_kernel<Mistake::kOverwriteOperand>},
      {"no proxy fence", &product_kernel<Mistake::kNoProxyFence>},
      {"no barrier before store", &product_kernel<Mistake::kNoStoreBarrier>},
      {"no wait for store", &product_kernel<Mistake::kNoStoreWait>},
      {"overwrite staging", &product_kernel<Mistake::kOverwriteStaging>},
      {"not a tensor map", &product_kernel<Mistake::kNotATensorMap>},
      {"tensor copy out of bounds", &product_kernel<Mistake::kOutOfShared>},
      {"copies", &copies_kernel<Copies::kRight>},
      {"copies no reader fence", &copies_kernel<Copies::kNoReaderFence>},
      {"copies do not arrive", &copies_kernel<Copies::kNoArrival>},
      {"registers", &copies_kernel<Copies::kFromRegisters>},
      {"release unread", &copies_kernel<Copies::kReleaseUnread>},
      {"touch a", &copies_kernel<Copies::kTouchA>},
      {"transposed", &transposed_kernel},
      {"setmaxnreg", &registers_kernel<Registers::kRight>},
      {"setmaxnreg some warps", &registers_kernel<Registers::kSomeWarps>},
      {"setmaxnreg too many", &registers_kernel<Registers::kMoreThanAtLaunch>},
      {"setmaxnreg wrong way", &registers_kernel<Registers::kWrongWay>},
      {"setmaxnreg differ", &registers_kernel<Registers::kDiffer>},
  };
  return all;
}

}  // namespace

// a and b: [64, 256], or [256, 64] of "transposed".
std::string run_hopper(const std::string& name, uint64_t a, uint64_t b, uint64_t out) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) return "no kernel of this name";
  Plan plan{};
  plan.rows_a = reinterpret_cast<const uint8_t*>(a);
  ptx::TensorMapShape shape;
  shape.box[0] = shape.box[1] = 64;
  shape.sizes[0] = shape.sizes[1] = 64;
  shape.byte_strides[0] = 128;
  LaunchStatus status =
      ptx::encode_tensor_map(reinterpret_cast<const void*>(out), shape, &plan.out);
  const bool transposed = name == "transposed";
  shape.sizes[0] = transposed ? 64 : 256;
  shape.sizes[1] = transposed ? 256 : 64;
  shape.byte_strides[0] = transposed ? 128 : 512;
  if (status.ok()) status = ptx::encode_tensor_map(plan.rows_a, shape, &plan.a);
  if (status.ok())
    status = ptx::encode_tensor_map(reinterpret_cast<const void*>(b), shape, &plan.b);
  if (!status.ok()) return status.error;
  const int threads = name.rfind("setmaxnreg", 0) == 0 ? 384 : kThreads;
  const ptx::LaunchConfig config{
      found->first.c_str(), {1, 1, 1}, threads, static_cast<int>(kSharedBytes), nullptr};
  return ptx::launch(found->second, config, plan).error;
}

std::vector<std::string> hopper_names() {
  std::vector<std::string> names;
  for (const auto& [name, kernel] : kernels()) names.push_back(name);
  return names;
}

}  // namespace internvl::selftest
