// One thread block on the CPU: a fiber per thread, warps in a seeded order, collectives of a warp
// carried out by the lane that arrives last.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "clocks.h"
#include "emulator/arithmetic.h"
#include "fiber.h"
#include "global_memory.h"
#include "mbarrier.h"
#include "session.h"
#include "shared_memory.h"
#include "warpgroup.h"

namespace internvl::emulator {

constexpr uint32_t kBarriers = 16;
constexpr uint32_t kMaxIdleCalls = 1u << 23;

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
  // cp.async under way, oldest first, in groups.
  std::vector<Copy> copies;
  std::vector<uint32_t> group_sizes;
  uint32_t uncommitted = 0;
  size_t landed = 0;
  // Likewise bulk stores.
  std::deque<BulkStore> stores;
  std::vector<uint32_t> store_group_sizes;
  uint32_t uncommitted_stores = 0;
  // What it knows beyond its warp, and how far its clock is ahead of the warp's.
  bool apart = false;
  Clocks own;
  uint32_t ahead = 0;
  // Proxy fences: the clock of each, and what was known at the last one.
  std::vector<uint32_t> fences;
  Clocks fenced;
  // The mbarrier it waits for.
  const MBarrier* waits_for = nullptr;
  uint32_t parity = 0;
  Site wait_site{};
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
  uint32_t alive = 0, runnable = 0;  // lanes, one bit each; not runnable: waits or has ended
  Lane* resume = nullptr;            // goes on when the warp is chosen
  bool ready = true;
  // The collective that lanes have arrived at.
  uint32_t arrived = 0;
  Collective kind{};
  Site site{};
  void* args[kLanes];
  // Progress, and what every lane knows of the others'.
  uint32_t clock = 0;
  Clocks known;
  bool apart = false;  // some lane knows more, or is ahead
  bool waits_for_products = false;
  std::vector<Access> log[kLanes];  // accesses since the last collective, for bank conflicts
};

struct Barrier {
  uint32_t expected = 0, arrived = 0;
  uint32_t arrived_warps = 0, waiting_warps = 0;  // bit masks
  Collective kind{};
  Site site{};
  bool any = false, all = true;
  Clocks known;
};

class Block final : public AsyncProxy {
 public:
  Block(const GridConfig& config, const std::function<void()>& kernel, KernelRun& run,
        const MmaOrder& order);
  // Runs block `index` (linear); false when it could not go on to its end.
  bool execute(uint32_t index, uint64_t seed);
  static Block* current;

  void collective(Collective kind, void* args, Site site);
  void leave();  // the current thread has ended
  uint32_t lane_id() const { return lane_->thread % kLanes; }
  void run_kernel() const { kernel_(); }

  // block_memory.cpp
  const void* load_shared(uint32_t addr, uint32_t bytes, Site site);
  void* store_shared(uint32_t addr, uint32_t bytes, Site site);
  const void* load_global(const void* src, uint32_t bytes, bool unchanging, Site site);
  void* store_global(void* dst, uint32_t bytes, Site site);
  uint32_t atomic_add(uint32_t* dst, uint32_t value, Site site);
  void copy_async(uint32_t dst, const void* src, uint32_t bytes, int src_bytes, Site site);
  void commit_group();
  void wait_group(uint32_t pending, Site site);

  // mbarriers.cpp
  void mbarrier_init(uint32_t addr, uint32_t arrivals, Site site);
  void fence_mbarrier_init(Site site);
  void mbarrier_arrive(uint32_t addr, Site site);
  void mbarrier_expect(uint32_t addr, uint32_t bytes, Site site);
  bool mbarrier_try_wait(uint32_t addr, uint32_t parity, Site site);
  void mbarrier_wait(uint32_t addr, uint32_t parity, Site site);
  void arrive_after_copies(uint32_t addr, Site site);
  void fence_proxy_async(Site site);

  // bulk.cpp
  void tma_load(uint32_t dst, const void* map, const Coordinates& at, uint32_t mbarrier, Site site);
  void tma_store(const void* map, uint32_t src, const Coordinates& at, bool add, Site site);
  void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, Site site);
  void bulk_store(void* dst, uint32_t src, uint32_t bytes, Site site);
  void bulk_commit_group();
  void bulk_wait_group(uint32_t pending, bool only_read, Site site);

  // AsyncProxy
  bool read_over(uint32_t unit, uint32_t id, const Actor& actor) const override;
  std::string read_text(uint32_t unit, uint32_t id) const override;
  bool fenced(uint32_t writer, uint32_t clock, uint32_t fences, const Actor& actor) const override;
  uint32_t fences_of(uint32_t thread) const override {
    return static_cast<uint32_t>(lanes_[thread].fences.size());
  }

  Statistics statistics;

 private:
  Warp& warp() { return warps_[lane_->thread / kLanes]; }
  uint32_t clock_of(const Lane& l) const { return warps_[l.thread / kLanes].clock + l.ahead; }
  const Clocks& known_to(const Lane& l) const {
    return l.apart ? l.own : warps_[l.thread / kLanes].known;
  }
  Actor actor_of(const Lane& l) const {
    return {l.thread, l.thread / kLanes, clock_of(l), &known_to(l)};
  }
  Actor actor() const { return actor_of(*lane_); }
  GlobalActor global_actor() { return {actor(), index_, &acquired_}; }
  Lane& lane(const Warp& w, uint32_t index) { return lanes_[w.index * kLanes + index]; }

  // block.cpp: who runs
  Lane& next_lane();
  void go_to(Lane& lane);
  void go_on_elsewhere();  // the current lane cannot
  void choose_warp();
  void block_lane();
  void wake(Lane& lane);
  [[noreturn]] void stop(const char* kind, Site site, const std::string& text);
  [[noreturn]] void end();
  void count_call(Site site) {
    if (++idle_calls_ > kMaxIdleCalls || session->over) give_up(site);
  }
  [[noreturn]] void give_up(Site site);
  void report_deadlock();
  void report_left_under_way();
  std::string warp_state(const Warp& w) const;

  // collectives.cpp
  void perform(Warp& w);
  void perform_ldmatrix(Warp& w);
  void perform_barrier(Warp& w);
  void complete(Barrier& barrier);
  Actor whole_warp(const Warp& w, Clocks& scratch) const;
  void level_clocks(Warp& w);
  void join_lanes(Warp& w);
  void advance(Warp& w);
  void note_synchronising(Site site, const char* kind);

  // accesses.cpp
  void log_access(const char* kind, uint64_t addr, uint32_t bytes, Site site);
  void count_accesses(Warp& w);

  // block_memory.cpp
  void land_copies(Lane& lane, size_t count, const Actor& as);

  // mbarriers.cpp
  MBarrier* find_mbarrier(uint32_t addr, Site site, bool for_copies);
  void arrive_at(MBarrier& barrier, const Clocks& known, ThreadClock thread, Site site);
  void complete_if_done(MBarrier& barrier, Site site);
  void acquire(const MBarrier& barrier);
  static bool phase_done(const MBarrier& barrier, uint32_t parity) {
    return (barrier.phase & 1u) != (parity & 1u);
  }

  // bulk.cpp
  bool land_one();  // of what arrives at mbarriers; false: nothing is under way
  void land(const Arriving& load);
  bool begin_load(uint32_t dst, uint32_t bytes, const MBarrier& barrier, Site site);
  void begin_store(BulkStore store);
  void write_store(const BulkStore& store);

  // warpgroups.cpp
  void issue_product(Warp& w);
  void take_registers(Warp& w, Product& product);
  void check_ordered_registers(Warp& w, const Product& product);
  void fence_registers(Warp& w);
  void wait_products(Warp& w);
  void compute(Warpgroup& group, Product& product);
  void deliver(Warp& w, Product& product);
  void note_operand(Warp& w, const Product& product, bool is_a, const Actor& actor);
  Product* under_way(Warp& w, const float* d, uint32_t after);
  void set_max_registers(Warp& w);
  void report_registers();
  Warpgroup& warpgroup(const Warp& w) { return warpgroups_[w.index / 4]; }
  WarpgroupWarp& warpgroup_warp(const Warp& w) { return warpgroup(w).warps[w.index % 4]; }

  const GridConfig& config_;
  const std::function<void()>& kernel_;
  KernelRun& run_;
  const MmaOrder& order_;
  SharedMemory shared_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Barrier barriers_[kBarriers];
  std::vector<Acquired> acquired_;
  std::deque<MBarrier> mbarriers_;
  std::vector<Arriving> arriving_;
  std::vector<BulkRead> bulk_reads_;  // by id - 1
  std::vector<Warpgroup> warpgroups_;
  Fiber outside_;
  Lane* lane_ = nullptr;
  Random random_{0};
  uint32_t index_ = 0;
  uint32_t step_ = 1;  // lanes run in ascending or descending order
  uint32_t quantum_ = 0;
  uint32_t warps_left_ = 0;
  uint32_t idle_calls_ = 0;  // since a barrier completed, something arrived or a thread ended
  bool stopped_ = false;
  uint64_t last_noted_ = 0;
};

}  // namespace internvl::emulator
