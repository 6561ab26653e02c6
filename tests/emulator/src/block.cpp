#include "block.h"

#include <algorithm>
#include <cstring>

namespace internvl::emulator {

__thread Index3 threadIdx, blockIdx, gridDim, blockDim;

namespace {

Block* current = nullptr;
FiberStacks stacks;

void thread_entry() {
  current->run_kernel();
  current->leave();
}

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kMmaBf16:
    case Collective::kMmaFp16:
      return "mma";
    case Collective::kLdmatrix:
      return "ldmatrix";
    case Collective::kShuffle:
      return "shfl";
    case Collective::kVoteAny:
    case Collective::kVoteAll:
      return "vote";
    case Collective::kSyncWarp:
      return "sync_warp";
    case Collective::kBarSync:
      return "bar.sync";
    case Collective::kBarArrive:
      return "bar.arrive";
    case Collective::kBarOr:
    case Collective::kBarAnd:
      return "bar.red";
  }
  return "collective";
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
  stopped_ = false;
  acquired_.clear();
  shared_.reset(config_.shared_bytes, static_cast<uint32_t>(warps_.size()));
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  for (uint32_t t = 0; t < lanes_.size(); ++t) {
    Lane& lane = lanes_[t];
    lane.thread = t;
    lane.exited = false;
    lane.copies.clear();
    lane.group_sizes.clear();
    lane.uncommitted = 0;
    stacks.prepare(lane.fiber, t, &thread_entry);
  }
  for (uint32_t i = 0; i < warps_.size(); ++i) {
    Warp& w = warps_[i];
    w.index = i;
    w.lanes_left = kLanes;
    w.resume = &lane(w, random_.below(kLanes));
    w.ready = true;
    w.arrived = 0;
    memset(w.known, 0, sizeof w.known);
    w.known[i] = 1;
  }
  warps_left_ = static_cast<uint32_t>(warps_.size());
  current = this;
  lane_ = warps_[random_.below(warps_left_)].resume;
  threadIdx = {lane_->thread, 0, 0};
  switch_fiber(outside_, lane_->fiber);
  current = nullptr;
  return !stopped_;
}

// ---- who runs ----

Actor Block::actor() {
  Warp& w = warp();
  return {lane_->thread, w.index, w.clock(), w.known};
}

void Block::go_to(Lane& to) {
  Lane* const from = lane_;
  if (from == &to) return;
  lane_ = &to;
  threadIdx.x = to.thread;
  switch_fiber(from->fiber, to.fiber);
}

Lane& Block::next_lane() {
  const Warp& w = warp();
  uint32_t at = lane_id();
  do at = (at + step_) % kLanes;
  while (lane(w, at).exited);
  return lane(w, at);
}

void Block::choose_warp() {
  uint32_t ready[kMaxWarps], count = 0;
  for (Warp& w : warps_)
    if (w.lanes_left > 0 && w.ready) ready[count++] = w.index;
  if (count == 0) report_deadlock();
  go_to(*warps_[ready[random_.below(count)]].resume);
}

void Block::leave() {
  Lane& left = *lane_;
  Warp& w = warp();
  if (!left.copies.empty())
    session->report("missing wait", left.copies[0].site,
                    text_of(actor()) + " ended with cp.async under way that it never waited for");
  left.exited = true;
  if (--w.lanes_left > 0) {
    if (w.arrived == w.lanes_left)
      stop("divergence", w.site,
           "warp " + std::to_string(w.index) + ": some lanes ended while others wait in " +
               name_of(w.kind));
    go_to(next_lane());
  } else {
    count_accesses(w);
    if (--warps_left_ > 0) choose_warp();
    switch_fiber(left.fiber, outside_);
  }
  __builtin_unreachable();
}

void Block::stop(const char* kind, Site site, const std::string& text) {
  session->report(kind, site,
                  std::string(config_.name) + ", block " + std::to_string(index_) + ", " + text);
  stopped_ = true;
  switch_fiber(lane_->fiber, outside_);
  __builtin_unreachable();
}

std::string Block::warp_state(const Warp& w) const {
  std::string text = "warp " + std::to_string(w.index);
  if (w.lanes_left == 0) return text + " has ended";
  return text + " waits at " + text_of(w.site);
}

void Block::report_deadlock() {
  std::string text = "no warp can go on";
  for (const Warp& w : warps_) text += "; " + warp_state(w);
  Site site{"(kernel)", 0};
  for (const Warp& w : warps_)
    if (w.lanes_left > 0) site = w.site;
  stop("deadlock", site, text);
}

// ---- collectives ----

void Block::collective(Collective kind, void* args, Site site) {
  if (kind >= Collective::kSyncWarp && session->skips(site)) return;  // a vote keeps its own value
  Warp& w = warp();
  if (w.arrived == 0) {
    w.kind = kind;
    w.site = site;
  } else if (w.kind != kind || w.site.line != site.line || w.site.file != site.file) {
    stop("divergence", site,
         text_of(actor()) + " is in " + name_of(kind) + ", other lanes of its warp in " +
             name_of(w.kind) + " at " + text_of(w.site));
  }
  w.args[lane_id()] = args;
  if (++w.arrived < kLanes) {
    if (w.arrived == w.lanes_left)
      stop("divergence", site,
           "warp " + std::to_string(w.index) + ": some lanes have ended before " + name_of(kind));
    go_to(next_lane());
    return;
  }
  w.arrived = 0;
  perform(w);
  if (quantum_-- == 0) {
    quantum_ = 8 + random_.below(64);
    w.resume = lane_;
    choose_warp();
  }
}

void Block::perform(Warp& w) {
  if (session->options.bank_conflicts) count_accesses(w);
  switch (w.kind) {
    case Collective::kMmaBf16:
    case Collective::kMmaFp16: {
      float* d[kLanes];
      const uint32_t *a[kLanes], *b[kLanes];
      const float* c[kLanes];
      for (uint32_t i = 0; i < kLanes; ++i) {
        const auto& args = *static_cast<MmaArgs*>(w.args[i]);
        d[i] = args.d;
        a[i] = args.a;
        b[i] = args.b;
        c[i] = args.c;
      }
      mma_m16n8k16(d, a, b, c, w.kind == Collective::kMmaBf16, order_);
      ++statistics.mma;
      break;
    }
    case Collective::kLdmatrix:
      perform_ldmatrix(w);
      break;
    case Collective::kShuffle: {
      uint32_t values[kLanes];
      for (uint32_t i = 0; i < kLanes; ++i) values[i] = static_cast<ShuffleArgs*>(w.args[i])->value;
      for (uint32_t i = 0; i < kLanes; ++i) {
        auto& args = *static_cast<ShuffleArgs*>(w.args[i]);
        args.value = values[args.source];
      }
      ++statistics.shuffles;
      break;
    }
    case Collective::kVoteAny:
    case Collective::kVoteAll: {
      bool any = false, all = true;
      for (void* args : w.args) {
        any |= static_cast<VoteArgs*>(args)->value;
        all &= static_cast<VoteArgs*>(args)->value;
      }
      for (void* args : w.args)
        static_cast<VoteArgs*>(args)->value = w.kind == Collective::kVoteAny ? any : all;
      ++statistics.votes;
      break;
    }
    case Collective::kSyncWarp:
      note_synchronising(w.site, "sync_warp");
      advance(w);
      ++statistics.warp_barriers;
      break;
    default:
      perform_barrier(w);
  }
}

// Matrix m: row r stands at the address of lane 8 * m + r. Lane l receives row l / 4, columns
// 2 * (l % 4) and the next one; of a transposed matrix column l / 4 and rows 2 * (l % 4) and next.
void Block::perform_ldmatrix(Warp& w) {
  const auto& first = *static_cast<LdmatrixArgs*>(w.args[0]);
  const uint32_t matrices = first.matrices;
  const bool transposed = first.transposed;
  const Actor whole{kWholeWarp, w.index, w.clock(), w.known};
  uint16_t elements[4][8][8];
  for (uint32_t m = 0; m < matrices; ++m) {
    uint32_t per_bank_group[8] = {}, worst = 1;
    uint32_t rows[8];
    for (uint32_t r = 0; r < 8; ++r) {
      rows[r] = static_cast<LdmatrixArgs*>(w.args[8 * m + r])->addr;
      memcpy(elements[m][r], shared_.load(rows[r], 16, whole, w.site), 16);
      bool repeated = false;
      for (uint32_t before = 0; before < r; ++before) repeated |= rows[before] == rows[r];
      if (repeated) continue;
      const uint32_t count = ++per_bank_group[rows[r] / 16 % 8];
      if (count > worst) worst = count;
    }
    statistics.ldmatrix_wavefronts += worst;
    if (session->options.bank_conflicts) {
      SiteAccesses& at = run_.accesses[text_of(w.site) + " ldmatrix"];
      at.kind = "ldmatrix";
      at.requests += m == 0;
      at.parts += worst;
      ++at.ideal;
    }
  }
  for (uint32_t i = 0; i < kLanes; ++i) {
    uint32_t* r = static_cast<LdmatrixArgs*>(w.args[i])->r;
    const uint32_t major = i / 4, minor = 2 * (i % 4);
    for (uint32_t m = 0; m < matrices; ++m) {
      const auto& x = elements[m];
      r[m] = transposed ? uint32_t{x[minor][major]} | uint32_t{x[minor + 1][major]} << 16
                        : uint32_t{x[major][minor]} | uint32_t{x[major][minor + 1]} << 16;
    }
  }
  ++statistics.ldmatrix;
}

void Block::perform_barrier(Warp& w) {
  const auto& args = *static_cast<BarrierArgs*>(w.args[0]);
  bool any = false, all = true;
  for (void* each : w.args) {
    const auto& other = *static_cast<BarrierArgs*>(each);
    if (other.id != args.id || other.threads != args.threads)
      stop("divergence", w.site,
           "warp " + std::to_string(w.index) + ": lanes name different barriers");
    any |= other.value;
    all &= other.value;
  }
  const uint32_t threads = args.threads == 0 ? config_.threads : args.threads;
  if (args.id < 0 || args.id >= static_cast<int>(kBarriers) || threads % kLanes != 0 ||
      threads > static_cast<uint32_t>(config_.threads))
    stop("barrier", w.site,
         "barrier " + std::to_string(args.id) + " of " + std::to_string(threads) +
             " threads; allowed: ids 0 to 15, multiples of 32 up to the block's threads");
  note_synchronising(w.site, name_of(w.kind));
  ++statistics.block_barriers;
  Barrier& barrier = barriers_[args.id];
  const uint32_t bit = 1u << w.index;
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.kind = w.kind;
    barrier.site = w.site;
  }
  const bool named = args.threads != 0;
  if (barrier.expected != threads || (barrier.arrived_warps & bit) ||
      (!named && (barrier.kind != w.kind || barrier.site.line != w.site.line)))
    stop("barrier", w.site,
         "warp " + std::to_string(w.index) + " meets others in barrier " + std::to_string(args.id) +
             " from " + text_of(barrier.site) + " with another number of threads, twice, or from " +
             "another sync_threads()");
  for (uint32_t i = 0; i < warps_.size(); ++i)
    barrier.known[i] = std::max(barrier.known[i], w.known[i]);
  barrier.known[w.index] = w.clock() + 1;
  advance(w);
  barrier.arrived += kLanes;
  barrier.arrived_warps |= bit;
  barrier.any |= any;
  barrier.all &= all;
  const bool waits = w.kind != Collective::kBarArrive;
  if (waits) barrier.waiting_warps |= bit;
  if (barrier.arrived == barrier.expected) {
    complete(barrier);
  } else if (waits) {
    w.ready = false;
    w.resume = lane_;
    choose_warp();
  }
}

void Block::complete(Barrier& barrier) {
  for (Warp& w : warps_) {
    if (!(barrier.waiting_warps & (1u << w.index))) continue;
    const uint32_t own = w.clock();
    for (uint32_t i = 0; i < warps_.size(); ++i)
      w.known[i] = std::max(w.known[i], barrier.known[i]);
    w.known[w.index] = own;
    w.ready = true;
    if (w.kind == Collective::kBarOr || w.kind == Collective::kBarAnd)
      for (void* args : w.args)
        static_cast<BarrierArgs*>(args)->value =
            w.kind == Collective::kBarOr ? barrier.any : barrier.all;
  }
  barrier = Barrier{};
}

void Block::note_synchronising(Site site, const char* kind) {
  const uint64_t id = session->site_id(site);
  if (id + 1 == last_noted_) return;
  last_noted_ = id + 1;
  run_.synchronising[text_of(site)] = kind;
}

// ---- the instructions' entry points ----

const void* load_shared(uint32_t addr, uint32_t bytes, Site site) {
  return current->load_shared(addr, bytes, site);
}
void* store_shared(uint32_t addr, uint32_t bytes, Site site) {
  return current->store_shared(addr, bytes, site);
}
const void* load_global(const void* src, uint32_t bytes, bool unchanging, Site site) {
  return current->load_global(src, bytes, unchanging, site);
}
void* store_global(void* dst, uint32_t bytes, Site site) {
  return current->store_global(dst, bytes, site);
}
uint32_t atomic_add_global(uint32_t* dst, uint32_t value, Site site) {
  return current->atomic_add(dst, value, site);
}
void fence_gpu(Site) {}  // the atomic operations order by themselves
void copy_async(uint32_t dst, const void* src, uint32_t bytes, int src_bytes, Site site) {
  current->copy_async(dst, src, bytes, src_bytes, site);
}
void commit_group(Site) { current->commit_group(); }
void wait_group(unsigned pending, Site site) { current->wait_group(pending, site); }
void collective(Collective kind, void* args, Site site) { current->collective(kind, args, site); }
uint32_t lane_id() { return current->lane_id(); }
void count_math() { ++current->statistics.math; }

}  // namespace internvl::emulator
