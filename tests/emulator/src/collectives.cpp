// Collectives of a warp and barriers of the block.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace internvl::emulator {
namespace {

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
    case Collective::kWgmma:
      return "wgmma";
    case Collective::kWgmmaCommit:
      return "wgmma_commit_group";
    case Collective::kWgmmaFence:
      return "wgmma_fence";
    case Collective::kWgmmaWait:
      return "wgmma_wait_group";
    case Collective::kSetMaxRegisters:
      return "setmaxnreg";
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

void Block::collective(Collective kind, void* args, Site site) {
  count_call(site);
  if (kind >= Collective::kWgmmaFence && session->skips(site))
    return;  // a vote keeps its own value
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
  w.runnable &= ~(1u << lane_id());
  if (++w.arrived < kLanes) {
    if (w.arrived == w.lanes_left)
      stop("divergence", site,
           "warp " + std::to_string(w.index) + ": some lanes have ended before " + name_of(kind));
    go_on_elsewhere();
    return;
  }
  w.arrived = 0;
  w.runnable = w.alive;
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
    case Collective::kWgmma:
      issue_product(w);
      break;
    case Collective::kWgmmaCommit: {
      WarpgroupWarp& products = warpgroup_warp(w);
      products.group_ends.push_back(products.issued);
      break;
    }
    case Collective::kWgmmaFence:
      note_synchronising(w.site, "wgmma_fence");
      fence_registers(w);
      break;
    case Collective::kWgmmaWait:
      note_synchronising(w.site, "wgmma_wait_group");
      wait_products(w);
      break;
    case Collective::kSetMaxRegisters:
      set_max_registers(w);
      break;
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
  uint16_t elements[4][8][8];
  for (uint32_t m = 0; m < matrices; ++m) {
    uint32_t per_bank_group[8] = {}, worst = 1;
    uint32_t rows[8];
    for (uint32_t r = 0; r < 8; ++r) {
      rows[r] = static_cast<LdmatrixArgs*>(w.args[8 * m + r])->addr;
      Actor whole = actor_of(lane(w, 8 * m + r));
      whole.thread = kWholeWarp;
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
  advance(w);
  barrier.known.join(w.known);
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
  idle_calls_ = 0;
  for (Warp& w : warps_) {
    if (!(barrier.waiting_warps & (1u << w.index))) continue;
    w.known.join(barrier.known);
    w.ready = true;
    if (w.kind == Collective::kBarOr || w.kind == Collective::kBarAnd)
      for (void* args : w.args)
        static_cast<BarrierArgs*>(args)->value =
            w.kind == Collective::kBarOr ? barrier.any : barrier.all;
  }
  barrier = Barrier{};
}

// The warp as one actor: what all of its lanes know.
Actor Block::whole_warp(const Warp& w, Clocks& scratch) const {
  const Lane* first = &lanes_[w.index * kLanes];
  const Clocks* known = &w.known;
  if (w.apart) {
    scratch = known_to(first[0]);
    for (uint32_t i = 1; i < kLanes; ++i) scratch.meet(known_to(first[i]));
    known = &scratch;
  }
  return {kWholeWarp, w.index, w.clock, known};
}

// Every lane's clock becomes that of the one furthest ahead.
void Block::level_clocks(Warp& w) {
  if (!w.apart) return;
  uint32_t ahead = 0;
  for (uint32_t i = 0; i < kLanes; ++i) {
    ahead = std::max(ahead, lane(w, i).ahead);
    lane(w, i).ahead = 0;
  }
  w.clock += ahead;
}

// Every lane knows what any lane knows.
void Block::join_lanes(Warp& w) {
  if (!w.apart) return;
  level_clocks(w);
  for (uint32_t i = 0; i < kLanes; ++i) {
    Lane& l = lane(w, i);
    if (l.apart) w.known.join(l.own);
    l.apart = false;
  }
  w.apart = false;
}

void Block::advance(Warp& w) {
  join_lanes(w);
  w.known.before[w.index] = ++w.clock;
}

void Block::note_synchronising(Site site, const char* kind) {
  const uint64_t id = session->site_id(site);
  if (id + 1 == last_noted_) return;
  last_noted_ = id + 1;
  run_.synchronising[text_of(site)] = kind;
}

}  // namespace internvl::emulator
