// What the emulated instructions call. One thread of the grid is current at any time; everything
// here acts on its behalf. `Site` is the line of the kernel source that holds the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace internvl::emulator {

struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Index3 {
  unsigned x, y, z;
};

// __thread, unlike thread_local, needs no check for a constructor at every use.
extern __thread Index3 threadIdx, blockIdx, gridDim, blockDim;

// Not 0, so that an offset that was not added to dynamic_shared() is out of bounds.
constexpr uint32_t kSharedBase = 0x400;

// ---- memory: a pointer to the bytes, or to scratch after a report ----

const void* load_shared(uint32_t addr, uint32_t bytes, Site site);
void* store_shared(uint32_t addr, uint32_t bytes, Site site);
const void* load_global(const void* src, uint32_t bytes, bool unchanging, Site site);
void* store_global(void* dst, uint32_t bytes, Site site);
uint32_t atomic_add_global(uint32_t* dst, uint32_t value, Site site);
void fence_gpu(Site site);

void copy_async(uint32_t dst, const void* src, uint32_t bytes, int src_bytes, Site site);
void commit_group(Site site);
void wait_group(unsigned pending, Site site);

// ---- barriers with transaction counts, the asynchronous proxy ----

void mbarrier_init(uint32_t addr, uint32_t arrivals, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_arrive(uint32_t addr, Site site);
void mbarrier_expect_tx(uint32_t addr, uint32_t bytes, Site site);
bool mbarrier_try_wait(uint32_t addr, uint32_t parity, Site site);
void mbarrier_wait(uint32_t addr, uint32_t parity, Site site);
void mbarrier_arrive_after_copies(uint32_t addr, Site site);
void fence_proxy_async(Site site);

struct Coordinates {
  int rank;
  int at[5];
};

void check_tensor_map(const void* map, Site site);
void tma_load(uint32_t dst, const void* map, const Coordinates& at, uint32_t mbarrier, Site site);
void tma_store(const void* map, uint32_t src, const Coordinates& at, bool add, Site site);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, Site site);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, Site site);
void bulk_commit_group(Site site);
void bulk_wait_group(unsigned pending, bool only_read, Site site);

// ---- collectives of a warp: every lane passes its own arguments ----

enum class Collective : uint8_t {
  kMmaBf16,
  kMmaFp16,
  kLdmatrix,
  kShuffle,
  kVoteAny,
  kVoteAll,
  kWgmma,
  kWgmmaCommit,
  kSetMaxRegisters,
  // Those that Session(skip=...) can leave out.
  kWgmmaFence,
  kWgmmaWait,
  kSyncWarp,
  kBarSync,
  kBarArrive,
  kBarOr,
  kBarAnd,
};

struct MmaArgs {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};

struct LdmatrixArgs {
  uint32_t* r;
  uint32_t addr;
  uint32_t matrices;
  bool transposed;
};

struct ShuffleArgs {
  uint32_t value;   // in: own; out: the source lane's
  uint32_t source;  // lane
};

struct VoteArgs {
  bool value;  // in: own; out: the vote
};

struct WgmmaArgs {
  float* d;           // n / 2 accumulators
  const uint32_t* a;  // 4 registers; null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool is_bf16, accumulate;
  bool a_mn_major, b_mn_major;
};

struct WgmmaWaitArgs {
  unsigned pending;
};

struct RegisterArgs {
  int count;
  bool increase;
};

struct BarrierArgs {
  int id;
  int threads;  // 0: the block
  bool value;   // kBarOr, kBarAnd
};

void collective(Collective kind, void* args, Site site);
uint32_t lane_id();

// ---- launches ----

struct GridConfig {
  const char* name;
  Index3 grid;
  int threads;
  int shared_bytes;
};

// Runs the kernel for every thread of the grid; returns what kept it from running.
std::string run_grid(const GridConfig& config, const std::function<void()>& kernel);

void count_math();

}  // namespace internvl::emulator
