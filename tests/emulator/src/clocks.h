// What one thread knows of the progress of others (vector clocks).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace internvl::emulator {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxWarps = 32;
constexpr uint32_t kMaxMBarriers = 64;
constexpr uint32_t kMaxClocks = kMaxWarps + kMaxMBarriers;

// Writers are threads, or the bulk copies that an mbarrier counts: thread number kLanes *
// (kMaxWarps
// + number of the mbarrier). The clock of the latter counts the barrier's phases.
constexpr uint32_t writer_of_mbarrier(uint32_t index) { return kLanes * (kMaxWarps + index); }

struct ThreadClock {
  uint32_t thread, clock;
};

struct Clocks {
  uint32_t before[kMaxClocks] = {};  // what a warp did at smaller clocks has happened before
  std::vector<ThreadClock> threads;  // single threads of which more is known

  bool knows(uint32_t thread, uint32_t clock) const {
    if (clock < before[thread / kLanes]) return true;
    for (const ThreadClock& more : threads)
      if (more.thread == thread) return clock < more.clock;
    return false;
  }

  // Has any thread of the warp, at a clock beyond `clock`, handed on what it knew?
  bool knows_any_of(uint32_t warp, uint32_t clock) const {
    if (clock < before[warp]) return true;
    for (const ThreadClock& more : threads)
      if (more.thread / kLanes == warp && clock < more.clock) return true;
    return false;
  }

  void add(ThreadClock more) {
    for (ThreadClock& mine : threads) {
      if (mine.thread != more.thread) continue;
      mine.clock = std::max(mine.clock, more.clock);
      return;
    }
    threads.push_back(more);
  }

  void join(const Clocks& other) {
    for (uint32_t i = 0; i < kMaxClocks; ++i) before[i] = std::max(before[i], other.before[i]);
    for (const ThreadClock& more : other.threads) add(more);
    drop_known();
  }

  // Keeps what both know.
  void meet(const Clocks& other) {
    for (uint32_t i = 0; i < kMaxClocks; ++i) before[i] = std::min(before[i], other.before[i]);
    threads.erase(std::remove_if(threads.begin(), threads.end(),
                                 [&](const ThreadClock& mine) {
                                   return !other.knows(mine.thread, mine.clock - 1);
                                 }),
                  threads.end());
  }

  // Forgets the single threads whose warps are known as far.
  void drop_known() {
    threads.erase(std::remove_if(threads.begin(), threads.end(),
                                 [&](const ThreadClock& mine) {
                                   return mine.clock <= before[mine.thread / kLanes];
                                 }),
                  threads.end());
  }
};

// Who acts: a thread, or a whole warp (ldmatrix, wgmma), and what it knows.
struct Actor {
  uint32_t thread;  // kWholeWarp: every lane of the warp
  uint32_t warp;
  uint32_t clock;
  const Clocks* known;

  bool knows(uint32_t other, uint32_t its_clock) const {
    return other == thread || its_clock < known->before[other / kLanes] ||
           (!known->threads.empty() && known->knows(other, its_clock));
  }
};

constexpr uint32_t kWholeWarp = 0xffffu;

}  // namespace internvl::emulator
