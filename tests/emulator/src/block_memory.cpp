// Loads, stores, atomics and asynchronous copies of the current thread.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace internvl::emulator {

const void* Block::load_shared(uint32_t addr, uint32_t bytes, Site site) {
  count_call(site);
  ++statistics.ld_shared;
  log_access("ld.shared", addr, bytes, site);
  return shared_.load(addr, bytes, actor(), site);
}

void* Block::store_shared(uint32_t addr, uint32_t bytes, Site site) {
  count_call(site);
  ++statistics.st_shared;
  log_access("st.shared", addr, bytes, site);
  return shared_.store(addr, bytes, actor(), site);
}

const void* Block::load_global(const void* src, uint32_t bytes, bool unchanging, Site site) {
  count_call(site);
  ++statistics.ld_global;
  statistics.ld_global_bytes += bytes;
  log_access("ld.global", reinterpret_cast<uintptr_t>(src), bytes, site);
  if (unchanging) global_memory.check_unchanging(src, global_actor(), site);
  return global_memory.load(src, bytes, global_actor(), site);
}

void* Block::store_global(void* dst, uint32_t bytes, Site site) {
  count_call(site);
  ++statistics.st_global;
  statistics.st_global_bytes += bytes;
  log_access("st.global", reinterpret_cast<uintptr_t>(dst), bytes, site);
  return global_memory.store(dst, bytes, global_actor(), site);
}

uint32_t Block::atomic_add(uint32_t* dst, uint32_t value, Site site) {
  count_call(site);
  ++statistics.atomics;
  const uint32_t* before = known_to(*lane_).before;
  const Release release{index_, lane_->thread, clock_of(*lane_),
                        std::vector<uint32_t>(before, before + warps_.size())};
  uint32_t* word = global_memory.atomic(dst, global_actor(), site, release, acquired_);
  const uint32_t value_before = *word;
  *word = value_before + value;
  return value_before;
}

void Block::copy_async(uint32_t dst, const void* src, uint32_t bytes, int src_bytes, Site site) {
  count_call(site);
  ++statistics.cp_async;
  statistics.cp_async_bytes += src_bytes;
  log_access("cp.async", dst, bytes, site);
  if (src_bytes < 0 || src_bytes > static_cast<int>(bytes))
    stop("cp.async", site, "src_bytes is " + std::to_string(src_bytes));
  if (src_bytes > 0) {
    if (reinterpret_cast<uintptr_t>(src) % bytes != 0) {
      session->report("misaligned", site,
                      text_of(actor()) + ": the source of a cp.async of " + std::to_string(bytes) +
                          " bytes is not aligned to its size");
      return;
    }
    if (!global_memory.check_read(src, src_bytes, global_actor(), site)) src_bytes = 0;
  }
  if (!shared_.begin_copy(dst, bytes, actor(), site)) return;
  lane_->copies.push_back({dst, bytes, src, static_cast<uint32_t>(src_bytes), site});
  ++lane_->uncommitted;
}

void Block::commit_group() {
  lane_->group_sizes.push_back(lane_->uncommitted);
  lane_->uncommitted = 0;
}

// As late as allowed: a group lands when its own thread waits for it, not before.
void Block::wait_group(uint32_t pending, Site site) {
  count_call(site);
  if (lane_id() == 0) note_synchronising(site, "cp_async_wait_group");
  if (session->skips(site)) return;
  std::vector<uint32_t>& groups = lane_->group_sizes;
  if (groups.size() <= pending) return;
  const size_t done = groups.size() - pending;
  size_t landed = 0;
  for (size_t g = 0; g < done; ++g) landed += groups[g];
  land_copies(*lane_, landed, actor());
  groups.erase(groups.begin(), groups.begin() + done);
}

// The oldest `count` copies of a lane; its groups keep what is left of them.
void Block::land_copies(Lane& of, size_t count, const Actor& as) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = of.copies[i];
    uint8_t* dst = shared_.land_copy(copy.dst, copy.bytes, as, copy.site);
    if (copy.src_bytes > 0) memcpy(dst, copy.src, copy.src_bytes);
    memset(dst + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
  }
  of.copies.erase(of.copies.begin(), of.copies.begin() + count);
  of.landed += count;
  for (uint32_t& size : of.group_sizes) {
    const auto part = static_cast<uint32_t>(std::min<size_t>(size, count));
    size -= part;
    count -= part;
  }
  of.uncommitted -= static_cast<uint32_t>(count);
}

}  // namespace internvl::emulator
