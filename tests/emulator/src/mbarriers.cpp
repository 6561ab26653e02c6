// mbarriers, the waits for them, and proxy fences.
#include <algorithm>

#include "block.h"

namespace internvl::emulator {
namespace {

constexpr int64_t kMaxBytes = (int64_t{1} << 20) - 1;
constexpr uint32_t kMaxArrivals = (uint32_t{1} << 20) - 1;

std::string text_of(const MBarrier& barrier) {
  return "the mbarrier at offset " + std::to_string(barrier.addr - kSharedBase) + " (" +
         std::to_string(barrier.count) + " arrivals, initialised at " + text_of(barrier.site) + ")";
}

// Warps whose 32 lanes have all arrived are known as a whole.
void unite_lanes(Clocks& clocks) {
  uint32_t lanes[kMaxWarps] = {}, least[kMaxWarps];
  for (const ThreadClock& more : clocks.threads) {
    const uint32_t warp = more.thread / kLanes;
    least[warp] = lanes[warp] == 0 ? more.clock : std::min(least[warp], more.clock);
    ++lanes[warp];
  }
  for (uint32_t warp = 0; warp < kMaxWarps; ++warp)
    if (lanes[warp] == kLanes) clocks.before[warp] = std::max(clocks.before[warp], least[warp]);
  clocks.drop_known();
}

}  // namespace

void Block::mbarrier_init(uint32_t addr, uint32_t arrivals, Site site) {
  if (arrivals == 0 || arrivals > kMaxArrivals)
    stop("mbarrier", site, "initialised with " + std::to_string(arrivals) + " arrivals");
  MBarrier* barrier = nullptr;
  for (MBarrier& other : mbarriers_)
    if (other.addr == addr) barrier = &other;
  if (barrier)
    session->report("mbarrier", site,
                    emulator::text_of(actor()) + " initialises " + text_of(*barrier) +
                        " again, in its phase " + std::to_string(barrier->phase));
  if (!shared_.claim_mbarrier(addr, actor(), site)) return;
  if (!barrier) {
    if (mbarriers_.size() == kMaxMBarriers)
      stop("mbarrier", site, "the emulator has room for 64 mbarriers");
    mbarriers_.emplace_back();
    barrier = &mbarriers_.back();
    barrier->index = static_cast<uint32_t>(mbarriers_.size()) - 1;
  }
  barrier->addr = addr;
  barrier->count = barrier->pending = arrivals;
  barrier->bytes = 0;
  barrier->phase += barrier->phase & 1u;
  barrier->fenced = false;
  barrier->thread = lane_->thread;
  barrier->clock = clock_of(*lane_);
  barrier->site = site;
}

MBarrier* Block::find_mbarrier(uint32_t addr, Site site, bool for_copies) {
  for (MBarrier& barrier : mbarriers_) {
    if (barrier.addr != addr) continue;
    if (!actor().knows(barrier.thread, barrier.clock))
      session->report("race", site,
                      emulator::text_of(actor()) + " uses " + text_of(barrier) +
                          ", but no barrier orders it after the initialisation");
    if (for_copies && !barrier.fenced)
      session->report(
          "missing fence", site,
          text_of(barrier) + " was not made known to the units that copy (fence_mbarrier_init)");
    return &barrier;
  }
  stop("mbarrier", site,
       "no mbarrier was initialised at offset " +
           std::to_string(static_cast<int64_t>(addr) - kSharedBase));
}

void Block::fence_mbarrier_init(Site site) {
  note_synchronising(site, "fence_mbarrier_init");
  if (session->skips(site)) return;
  for (MBarrier& barrier : mbarriers_)
    if (barrier.thread == lane_->thread) barrier.fenced = true;
}

void Block::mbarrier_arrive(uint32_t addr, Site site) {
  count_call(site);
  MBarrier& barrier = *find_mbarrier(addr, site, false);
  const uint32_t clock = clock_of(*lane_);
  // Later accesses of the thread are no longer part of what it hands on.
  ++lane_->ahead;
  warp().apart = true;
  arrive_at(barrier, known_to(*lane_), {lane_->thread, clock + 1}, site);
}

void Block::arrive_at(MBarrier& barrier, const Clocks& known, ThreadClock thread, Site site) {
  idle_calls_ = 0;
  ++statistics.mbarrier_arrivals;
  if (barrier.pending == 0) {
    session->report("mbarrier", site,
                    text_of(barrier) + ": one arrival more than its phase counts, while " +
                        std::to_string(barrier.bytes) + " bytes have yet to come");
    return;
  }
  --barrier.pending;
  barrier.arriving.join(known);
  barrier.arriving.add(thread);
  complete_if_done(barrier, site);
}

void Block::mbarrier_expect(uint32_t addr, uint32_t bytes, Site site) {
  MBarrier& barrier = *find_mbarrier(addr, site, false);
  barrier.bytes += bytes;
  if (barrier.bytes > kMaxBytes || bytes > kMaxBytes)
    session->report("mbarrier", site,
                    text_of(barrier) + " waits for " + std::to_string(barrier.bytes) +
                        " bytes; it can count 2^20 - 1");
}

void Block::complete_if_done(MBarrier& barrier, Site site) {
  if (barrier.pending > 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0)
    session->report("mbarrier", site,
                    text_of(barrier) + ": " + std::to_string(-barrier.bytes) +
                        " bytes more have come than were announced");
  barrier.bytes = 0;
  ++barrier.phase;
  barrier.pending = barrier.count;
  unite_lanes(barrier.arriving);
  barrier.completed.join(barrier.arriving);
  barrier.arriving = Clocks{};
  for (Lane& waiting : lanes_)
    if (waiting.waits_for == &barrier && phase_done(barrier, waiting.parity)) wake(waiting);
}

void Block::acquire(const MBarrier& barrier) {
  ++statistics.mbarrier_waits;
  if (!lane_->apart) {
    lane_->own = warp().known;
    lane_->apart = warp().apart = true;
  }
  lane_->own.join(barrier.completed);
  uint32_t& phases = lane_->own.before[kMaxWarps + barrier.index];
  phases = std::max(phases, barrier.phase);
}

void Block::mbarrier_wait(uint32_t addr, uint32_t parity, Site site) {
  count_call(site);
  note_synchronising(site, "mbarrier_wait_parity");
  if (session->skips(site)) return;
  const MBarrier& barrier = *find_mbarrier(addr, site, false);
  while (!phase_done(barrier, parity)) {
    lane_->waits_for = &barrier;
    lane_->parity = parity & 1u;
    lane_->wait_site = site;
    block_lane();
  }
  acquire(barrier);
}

bool Block::mbarrier_try_wait(uint32_t addr, uint32_t parity, Site site) {
  count_call(site);
  note_synchronising(site, "mbarrier_try_wait_parity");
  if (session->skips(site)) return true;
  const MBarrier& barrier = *find_mbarrier(addr, site, false);
  if (!phase_done(barrier, parity)) {
    if (random_.below(4) == 0) land_one();
    warp().resume = lane_;
    choose_warp();
  }
  if (!phase_done(barrier, parity)) return false;
  acquire(barrier);
  return true;
}

void Block::arrive_after_copies(uint32_t addr, Site site) {
  MBarrier& barrier = *find_mbarrier(addr, site, false);
  const uint32_t clock = clock_of(*lane_);
  ++lane_->ahead;
  warp().apart = true;
  Arriving arrival{Arriving::Kind::kAfterCopies, barrier.index, site};
  arrival.thread = lane_->thread;
  arrival.clock = clock;
  arrival.copies = lane_->landed + lane_->copies.size();
  arrival.known = known_to(*lane_);
  if (lane_->copies.empty())
    arrive_at(barrier, arrival.known, {lane_->thread, clock + 1}, site);
  else
    arriving_.push_back(arrival);
}

void Block::fence_proxy_async(Site site) {
  note_synchronising(site, "fence_proxy_async_shared");
  if (session->skips(site)) return;
  ++statistics.proxy_fences;
  lane_->fences.push_back(clock_of(*lane_));
  lane_->fenced = known_to(*lane_);
  for (MBarrier& barrier : mbarriers_)
    if (barrier.thread == lane_->thread) barrier.fenced = true;
}

// The writer fenced after its write and before what orders the actor after it; or the actor did,
// after what orders it.
bool Block::fenced(uint32_t writer, uint32_t clock, uint32_t fences, const Actor& actor) const {
  const std::vector<uint32_t>& made = lanes_[writer].fences;
  if (fences < made.size() && actor.knows(writer, made[fences])) return true;
  const auto by_reader = [&](const Lane& l) {
    return l.thread == writer ? l.fences.size() > fences : l.fenced.knows(writer, clock);
  };
  if (actor.thread != kWholeWarp) return by_reader(lanes_[actor.thread]);
  for (uint32_t i = 0; i < kLanes; ++i)
    if (!by_reader(lanes_[actor.warp * kLanes + i])) return false;
  return true;
}

// ---- the instructions' entry points ----

void mbarrier_init(uint32_t addr, uint32_t arrivals, Site site) {
  Block::current->mbarrier_init(addr, arrivals, site);
}
void fence_mbarrier_init(Site site) { Block::current->fence_mbarrier_init(site); }
void mbarrier_arrive(uint32_t addr, Site site) { Block::current->mbarrier_arrive(addr, site); }
void mbarrier_expect_tx(uint32_t addr, uint32_t bytes, Site site) {
  Block::current->mbarrier_expect(addr, bytes, site);
}
bool mbarrier_try_wait(uint32_t addr, uint32_t parity, Site site) {
  return Block::current->mbarrier_try_wait(addr, parity, site);
}
void mbarrier_wait(uint32_t addr, uint32_t parity, Site site) {
  Block::current->mbarrier_wait(addr, parity, site);
}
void mbarrier_arrive_after_copies(uint32_t addr, Site site) {
  Block::current->arrive_after_copies(addr, site);
}
void fence_proxy_async(Site site) { Block::current->fence_proxy_async(site); }

}  // namespace internvl::emulator
