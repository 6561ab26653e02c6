// The threads of a block: who runs, who waits, and the entry points of the instructions.
#include "block.h"

#include <algorithm>

namespace internvl::emulator {

__thread Index3 threadIdx, blockIdx, gridDim, blockDim;

Block* Block::current = nullptr;

namespace {

FiberStacks stacks;

void thread_entry() {
  Block::current->run_kernel();
  Block::current->leave();
}

}  // namespace

Block::Block(const GridConfig& config, const std::function<void()>& kernel, KernelRun& run,
             const MmaOrder& order)
    : config_(config),
      kernel_(kernel),
      run_(run),
      order_(order),
      lanes_(config.threads),
      warps_(config.threads / kLanes) {
  stacks.reserve(lanes_.size());
}

bool Block::execute(uint32_t index, uint64_t seed) {
  index_ = index;
  random_ = Random(seed + index);
  step_ = random_.below(2) ? 1 : kLanes - 1;
  quantum_ = 8;
  idle_calls_ = 0;
  stopped_ = false;
  acquired_.clear();
  mbarriers_.clear();
  arriving_.clear();
  bulk_reads_.clear();
  warpgroups_.assign((warps_.size() + 3) / 4, Warpgroup{});
  for (Warpgroup& group : warpgroups_) group.registers = registers_at_launch(config_.threads);
  shared_.reset(config_.shared_bytes, static_cast<uint32_t>(warps_.size()), this);
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  for (uint32_t t = 0; t < lanes_.size(); ++t) {
    lanes_[t] = Lane{};
    lanes_[t].thread = t;
    stacks.prepare(lanes_[t].fiber, t, &thread_entry);
  }
  for (uint32_t i = 0; i < warps_.size(); ++i) {
    Warp& w = warps_[i];
    w.index = i;
    w.lanes_left = kLanes;
    w.alive = w.runnable = 0xffffffffu;
    w.resume = &lane(w, random_.below(kLanes));
    w.ready = true;
    w.arrived = 0;
    w.known = Clocks{};
    w.clock = w.known.before[i] = 1;
    w.apart = false;
  }
  warps_left_ = static_cast<uint32_t>(warps_.size());
  current = this;
  lane_ = warps_[random_.below(warps_left_)].resume;
  threadIdx = {lane_->thread, 0, 0};
  switch_fiber(outside_, lane_->fiber);
  current = nullptr;
  return !stopped_;
}

void Block::go_to(Lane& to) {
  Lane* const from = lane_;
  if (from == &to) return;
  lane_ = &to;
  threadIdx.x = to.thread;
  switch_fiber(from->fiber, to.fiber);
}

// The next runnable lane in this run's direction; there is one.
Lane& Block::next_lane() {
  const Warp& w = warp();
  uint32_t at = lane_id();
  do at = (at + step_) % kLanes;
  while (!(w.runnable >> at & 1u));
  return lane(w, at);
}

void Block::go_on_elsewhere() {
  Warp& w = warp();
  if (w.runnable != 0) {
    go_to(next_lane());
  } else {
    w.ready = false;
    choose_warp();
  }
}

// What copies bring arrives as late as possible with seed 0, else at any time.
void Block::choose_warp() {
  if (!arriving_.empty() && session->options.seed != 0 && random_.below(4) == 0) land_one();
  for (;;) {
    uint32_t ready[kMaxWarps], count = 0;
    for (Warp& w : warps_)
      if (w.lanes_left > 0 && w.ready) ready[count++] = w.index;
    if (count > 0) {
      go_to(*warps_[ready[random_.below(count)]].resume);
      return;
    }
    if (!land_one()) report_deadlock();
  }
}

// Returns when somebody woke the lane.
void Block::block_lane() {
  Warp& w = warp();
  w.runnable &= ~(1u << lane_id());
  go_on_elsewhere();
}

void Block::wake(Lane& woken) {
  Warp& w = warps_[woken.thread / kLanes];
  w.runnable |= 1u << woken.thread % kLanes;
  woken.waits_for = nullptr;
  if (w.ready) return;
  w.ready = true;
  w.resume = &woken;
}

void Block::leave() {
  Lane& left = *lane_;
  Warp& w = warp();
  idle_calls_ = 0;
  size_t arriving = left.landed;  // copies that some mbarrier waits for
  for (const Arriving& after : arriving_)
    if (after.kind == Arriving::Kind::kAfterCopies && after.thread == left.thread)
      arriving = std::max(arriving, after.copies);
  if (left.landed + left.copies.size() > arriving)
    session->report("missing wait", left.copies[0].site,
                    text_of(actor()) + " ended with cp.async under way that it never waited for");
  if (!left.stores.empty())
    session->report("missing wait", left.stores[0].site,
                    text_of(actor()) + " ended with a bulk store that may still read its source");
  left.exited = true;
  w.alive &= ~(1u << lane_id());
  w.runnable &= ~(1u << lane_id());
  if (--w.lanes_left > 0) {
    if (w.arrived == w.lanes_left)
      stop("divergence", w.site,
           "warp " + std::to_string(w.index) + ": some lanes ended while others wait at " +
               text_of(w.site));
    go_on_elsewhere();
  } else {
    count_accesses(w);
    if (--warps_left_ > 0) choose_warp();
    report_left_under_way();
    switch_fiber(left.fiber, outside_);
  }
  __builtin_unreachable();
}

void Block::report_left_under_way() {
  for (const Arriving& load : arriving_)
    session->report("missing wait", load.site,
                    "the block ended while what its mbarrier waits for was under way");
  for (const Warpgroup& group : warpgroups_)
    if (!group.products.empty())
      session->report("missing wait", group.products[0].site,
                      "the block ended with a wgmma under way that was never waited for");
  report_registers();
}

void Block::stop(const char* kind, Site site, const std::string& text) {
  session->report(kind, site,
                  std::string(config_.name) + ", block " + std::to_string(index_) + ", " + text);
  end();
}

void Block::end() {
  stopped_ = true;
  switch_fiber(lane_->fiber, outside_);
  __builtin_unreachable();
}

// A loop without end: what a wait lets through too early may be the number of its rounds.
void Block::give_up(Site site) {
  if (session->over) end();
  stop("deadlock", site,
       text_of(actor()) + " goes on, but in the last " + std::to_string(kMaxIdleCalls) +
           " calls of the block no barrier completed, nothing arrived and no thread ended");
}

std::string Block::warp_state(const Warp& w) const {
  std::string text = "warp " + std::to_string(w.index);
  if (w.lanes_left == 0) return text + " has ended";
  for (uint32_t i = 0; i < kLanes; ++i) {
    const Lane& l = lanes_[w.index * kLanes + i];
    if (!l.waits_for) continue;
    const MBarrier& barrier = *l.waits_for;
    return text + " (lane " + std::to_string(i) + ") waits at " + text_of(l.wait_site) +
           " for phase parity " + std::to_string(l.parity) + " of the mbarrier at offset " +
           std::to_string(barrier.addr - kSharedBase) + ", which is in phase " +
           std::to_string(barrier.phase) + " and lacks " + std::to_string(barrier.pending) +
           " arrivals and " + std::to_string(barrier.bytes) + " bytes";
  }
  return text + " waits at " + text_of(w.site);
}

void Block::report_deadlock() {
  std::string text = "no warp can go on";
  Site site{"(kernel)", 0};
  for (const Warp& w : warps_) {
    text += "; " + warp_state(w);
    if (w.lanes_left > 0 && w.arrived == 0) site = w.site.file ? w.site : site;
  }
  for (const Lane& l : lanes_)
    if (l.waits_for) site = l.wait_site;
  stop("deadlock", site, text);
}

// ---- the instructions' entry points ----

const void* load_shared(uint32_t addr, uint32_t bytes, Site site) {
  return Block::current->load_shared(addr, bytes, site);
}
void* store_shared(uint32_t addr, uint32_t bytes, Site site) {
  return Block::current->store_shared(addr, bytes, site);
}
const void* load_global(const void* src, uint32_t bytes, bool unchanging, Site site) {
  return Block::current->load_global(src, bytes, unchanging, site);
}
void* store_global(void* dst, uint32_t bytes, Site site) {
  return Block::current->store_global(dst, bytes, site);
}
uint32_t atomic_add_global(uint32_t* dst, uint32_t value, Site site) {
  return Block::current->atomic_add(dst, value, site);
}
void fence_gpu(Site) {}  // the atomic operations order by themselves
void copy_async(uint32_t dst, const void* src, uint32_t bytes, int src_bytes, Site site) {
  Block::current->copy_async(dst, src, bytes, src_bytes, site);
}
void commit_group(Site) { Block::current->commit_group(); }
void wait_group(unsigned pending, Site site) { Block::current->wait_group(pending, site); }
void collective(Collective kind, void* args, Site site) {
  Block::current->collective(kind, args, site);
}
uint32_t lane_id() { return Block::current->lane_id(); }
void count_math() { ++Block::current->statistics.math; }

}  // namespace internvl::emulator
