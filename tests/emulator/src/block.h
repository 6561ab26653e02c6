// One thread block on the CPU: a fiber per thread, warps in a seeded order, collectives of a warp
// carried out by the lane that arrives last.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "emulator/arithmetic.h"
#include "fiber.h"
#include "global_memory.h"
#include "session.h"
#include "shared_memory.h"

namespace internvl::emulator {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxWarps = 32;
constexpr uint32_t kBarriers = 16;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x853c49e6748fea9bull) {}
  uint32_t below(uint32_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_;
};

struct Copy {
  uint32_t dst;
  uint32_t bytes;
  const void* src;
  uint32_t src_bytes;
  Site site;
};

struct Lane {
  Fiber fiber;
  uint32_t thread = 0;
  bool exited = false;
  std::vector<Copy> copies;           // under way, oldest first
  std::vector<uint32_t> group_sizes;  // committed groups, oldest first
  uint32_t uncommitted = 0;
};

struct Access {
  Site site;
  const char* kind;
  uint64_t addr;
  uint32_t bytes;
};

struct Warp {
  uint32_t index = 0;
  uint32_t lanes_left = 0;
  Lane* resume = nullptr;  // goes on when the warp is chosen
  bool ready = true;
  // The collective that lanes have arrived at.
  uint32_t arrived = 0;
  Collective kind{};
  Site site{};
  void* args[kLanes];
  // Progress and what is known of the others' (vector clock).
  uint32_t known[kMaxWarps];
  std::vector<Access> log[kLanes];  // accesses since the last collective, for bank conflicts

  uint32_t clock() const { return known[index]; }
};

struct Barrier {
  uint32_t expected = 0, arrived = 0;
  uint32_t arrived_warps = 0, waiting_warps = 0;  // bit masks
  Collective kind{};
  Site site{};
  bool any = false, all = true;
  uint32_t known[kMaxWarps] = {};
};

class Block {
 public:
  Block(const GridConfig& config, const std::function<void()>& kernel, KernelRun& run,
        const MmaOrder& order);
  // Runs block `index` (linear); false when it could not go on to its end.
  bool execute(uint32_t index, uint64_t seed);

  void collective(Collective kind, void* args, Site site);
  const void* load_shared(uint32_t addr, uint32_t bytes, Site site);
  void* store_shared(uint32_t addr, uint32_t bytes, Site site);
  const void* load_global(const void* src, uint32_t bytes, bool unchanging, Site site);
  void* store_global(void* dst, uint32_t bytes, Site site);
  uint32_t atomic_add(uint32_t* dst, uint32_t value, Site site);
  void copy_async(uint32_t dst, const void* src, uint32_t bytes, int src_bytes, Site site);
  void commit_group();
  void wait_group(uint32_t pending, Site site);
  void leave();  // the current thread has ended
  uint32_t lane_id() const { return lane_->thread % kLanes; }
  void run_kernel() const { kernel_(); }

  Statistics statistics;

 private:
  Warp& warp() { return warps_[lane_->thread / kLanes]; }
  Actor actor();
  GlobalActor global_actor() { return {actor(), index_, &acquired_}; }
  Lane& lane(const Warp& w, uint32_t index) { return lanes_[w.index * kLanes + index]; }
  Lane& next_lane();
  void go_to(Lane& lane);
  void choose_warp();
  void perform(Warp& w);
  void perform_ldmatrix(Warp& w);
  void perform_barrier(Warp& w);
  void complete(Barrier& barrier);
  void advance(Warp& w) { ++w.known[w.index]; }
  void note_synchronising(Site site, const char* kind);
  void log_access(const char* kind, uint64_t addr, uint32_t bytes, Site site);
  void count_accesses(Warp& w);
  [[noreturn]] void stop(const char* kind, Site site, const std::string& text);
  void report_deadlock();
  std::string warp_state(const Warp& w) const;

  const GridConfig& config_;
  const std::function<void()>& kernel_;
  KernelRun& run_;
  const MmaOrder& order_;
  SharedMemory shared_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Barrier barriers_[kBarriers];
  std::vector<Acquired> acquired_;
  Fiber outside_;
  Lane* lane_ = nullptr;
  Random random_{0};
  uint32_t index_ = 0;
  uint32_t step_ = 1;  // lanes run in ascending or descending order
  uint32_t quantum_ = 0;
  uint32_t warps_left_ = 0;
  bool stopped_ = false;
  uint64_t last_noted_ = 0;
};

}  // namespace internvl::emulator
