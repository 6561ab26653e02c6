// Bulk copies: tensor maps interpreted, loads that land as late as the waits allow, stores that
// read their source when their thread waits for them.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace internvl::emulator {
namespace {

constexpr uint32_t kChunk = 16;
constexpr uint32_t kTensorAlignment = 128;
constexpr auto kFp32 = static_cast<uint8_t>(ptx::TensorMapType::kFp32);

uint32_t row_bytes(const TensorMapDescription& map) { return map.box[0] * map.element_bytes; }

uint32_t box_bytes(const TensorMapDescription& map) {
  uint32_t bytes = row_bytes(map);
  for (int i = 1; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Bits 4 and up of a shared address, XORed with bits 7 and up.
uint32_t swizzled(uint32_t addr, uint32_t span) {
  return span == 0 ? addr : addr ^ (addr >> 3 & (span - kChunk));
}

// Calls each(offset in the packed box, pointer into the tensor, bytes) for what lies inside of the
// tensor, row by row.
template <class Each>
void for_each_row(const TensorMapDescription& map, const Coordinates& at, const Each& each) {
  const uint32_t row = row_bytes(map), rows = box_bytes(map) / row;
  const int64_t first = std::max<int64_t>(0, -int64_t{at.at[0]});
  const int64_t end = std::min<int64_t>(map.box[0], int64_t{map.sizes[0]} - at.at[0]);
  if (first >= end) return;
  for (uint32_t r = 0; r < rows; ++r) {
    uint8_t* ptr = map.base + (at.at[0] + first) * map.element_bytes;
    bool inside = true;
    uint32_t rest = r;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = int64_t{at.at[i]} + rest % map.box[i];
      rest /= map.box[i];
      inside &= index >= 0 && index < int64_t{map.sizes[i]};
      ptr += index * map.byte_strides[i];
    }
    if (inside)
      each(r * row + static_cast<uint32_t>(first) * map.element_bytes, ptr,
           static_cast<uint32_t>(end - first) * map.element_bytes);
  }
}

// Calls each(place in shared memory, offset in the row, bytes) for the parts of a row that stay
// together.
template <class Each>
void for_each_chunk(uint32_t addr, uint32_t bytes, uint32_t span, const Each& each) {
  for (uint32_t done = 0; done < bytes;) {
    const uint32_t part = std::min(bytes - done, kChunk - (addr + done) % kChunk);
    each(swizzled(addr + done, span), done, part);
    done += part;
  }
}

const TensorMapDescription* checked(const void* map, int rank, std::string& error) {
  const TensorMapDescription* description = description_of(map);
  if (!description)
    error = "not a tensor map, or not in a kernel parameter";
  else if (rank != 0 && description->rank != rank)
    error = "the tensor map has " + std::to_string(description->rank) +
            " dimensions, the instruction " + std::to_string(rank);
  return description;
}

}  // namespace

// ---- loads ----

bool Block::begin_load(uint32_t dst, uint32_t bytes, const MBarrier& barrier, Site site) {
  if (!shared_.in_bounds(dst, bytes, kChunk, site, "bulk copy")) return false;
  ++statistics.bulk_loads;
  statistics.bulk_load_bytes += bytes;
  return shared_.begin_bulk(dst, bytes, actor(), writer_of_mbarrier(barrier.index), barrier.phase,
                            site);
}

void Block::tma_load(uint32_t dst, const void* map, const Coordinates& at, uint32_t mbarrier,
                     Site site) {
  std::string error;
  const TensorMapDescription* description = checked(map, at.rank, error);
  if (!error.empty()) stop("tensor map", site, error);
  const MBarrier& barrier = *find_mbarrier(mbarrier, site, true);
  const uint32_t bytes = box_bytes(*description);
  if (!shared_.in_bounds(dst, bytes, kTensorAlignment, site, "tensor copy")) return;
  for_each_row(*description, at, [&](uint32_t, const uint8_t* src, uint32_t count) {
    global_memory.check_read(src, count, global_actor(), site);
  });
  if (!begin_load(dst, bytes, barrier, site)) return;
  Arriving load{Arriving::Kind::kTensor, barrier.index, site};
  load.dst = dst;
  load.bytes = bytes;
  load.map = *description;
  load.at = at;
  arriving_.push_back(load);
}

void Block::bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, Site site) {
  const MBarrier& barrier = *find_mbarrier(mbarrier, site, true);
  if (bytes % kChunk != 0 || bytes == 0 || reinterpret_cast<uintptr_t>(src) % kChunk != 0) {
    session->report("misaligned", site, "bulk copies move multiples of 16 bytes, aligned to 16");
    return;
  }
  global_memory.check_read(src, bytes, global_actor(), site);
  if (!begin_load(dst, bytes, barrier, site)) return;
  Arriving load{Arriving::Kind::kRow, barrier.index, site};
  load.dst = dst;
  load.bytes = bytes;
  load.src = src;
  arriving_.push_back(load);
}

// In any order.
bool Block::land_one() {
  if (arriving_.empty()) return false;
  const uint32_t chosen = random_.below(static_cast<uint32_t>(arriving_.size()));
  const Arriving load = arriving_[chosen];
  arriving_.erase(arriving_.begin() + chosen);
  land(load);
  return true;
}

void Block::land(const Arriving& load) {
  idle_calls_ = 0;
  MBarrier& barrier = mbarriers_[load.mbarrier];
  if (load.kind == Arriving::Kind::kAfterCopies) {
    Lane& of = lanes_[load.thread];
    const Actor as{load.thread, load.thread / kLanes, load.clock, &load.known};
    if (load.copies > of.landed) land_copies(of, load.copies - of.landed, as);
    arrive_at(barrier, load.known, {load.thread, load.clock + 1}, load.site);
    return;
  }
  uint8_t* dst = shared_.land_bulk(load.dst, load.bytes);
  if (load.kind == Arriving::Kind::kRow) {
    memcpy(dst, load.src, load.bytes);
  } else {
    memset(dst, 0, load.bytes);
    for_each_row(load.map, load.at, [&](uint32_t offset, const uint8_t* src, uint32_t bytes) {
      for_each_chunk(load.dst + offset, bytes, load.map.swizzle,
                     [&](uint32_t place, uint32_t done, uint32_t part) {
                       memcpy(dst + (place - load.dst), src + done, part);
                     });
    });
  }
  barrier.bytes -= load.bytes;
  complete_if_done(barrier, load.site);
}

// ---- stores ----

void Block::begin_store(BulkStore store) {
  bulk_reads_.push_back({store.site, lane_->thread, 0, false});
  store.id = static_cast<uint32_t>(bulk_reads_.size());
  for (uint32_t done = 0; done < store.bytes; done += kChunk)
    if (!shared_.begin_async_read(store.src + done, actor(), kBulkUnit, store.id, store.site))
      return;
  ++statistics.bulk_stores;
  statistics.bulk_store_bytes += store.bytes;
  lane_->stores.push_back(store);
  ++lane_->uncommitted_stores;
}

void Block::tma_store(const void* map, uint32_t src, const Coordinates& at, bool add, Site site) {
  std::string error;
  const TensorMapDescription* description = checked(map, at.rank, error);
  if (!error.empty()) stop("tensor map", site, error);
  if (add && description->type != kFp32) stop("tensor map", site, "only fp32 is added");
  const uint32_t bytes = box_bytes(*description);
  if (!shared_.in_bounds(src, bytes, kTensorAlignment, site, "tensor copy")) return;
  for_each_row(*description, at, [&](uint32_t, uint8_t* dst, uint32_t count) {
    global_memory.check_write(dst, count, global_actor(), site, add);
  });
  begin_store({0, site, src, *description, at, nullptr, bytes, add});
}

void Block::bulk_store(void* dst, uint32_t src, uint32_t bytes, Site site) {
  if (bytes % kChunk != 0 || bytes == 0 || reinterpret_cast<uintptr_t>(dst) % kChunk != 0) {
    session->report("misaligned", site, "bulk copies move multiples of 16 bytes, aligned to 16");
    return;
  }
  if (!shared_.in_bounds(src, bytes, kChunk, site, "bulk copy")) return;
  if (!global_memory.check_write(dst, bytes, global_actor(), site, false)) return;
  begin_store({0, site, src, {}, {}, dst, bytes, false});
}

void Block::bulk_commit_group() {
  lane_->store_group_sizes.push_back(lane_->uncommitted_stores);
  lane_->uncommitted_stores = 0;
}

void Block::bulk_wait_group(uint32_t pending, bool only_read, Site site) {
  note_synchronising(site, only_read ? "bulk_wait_group_read" : "bulk_wait_group");
  if (session->skips(site)) return;
  std::vector<uint32_t>& groups = lane_->store_group_sizes;
  for (; groups.size() > pending; groups.erase(groups.begin())) {
    for (uint32_t i = 0; i < groups[0]; ++i) {
      const BulkStore& store = lane_->stores.front();
      write_store(store);
      BulkRead& read = bulk_reads_[store.id - 1];
      read.over = true;
      read.clock = clock_of(*lane_);
      lane_->stores.pop_front();
    }
  }
}

void Block::write_store(const BulkStore& store) {
  if (store.dst) {
    memcpy(store.dst, shared_.bytes(store.src), store.bytes);
    return;
  }
  for_each_row(store.map, store.at, [&](uint32_t offset, uint8_t* dst, uint32_t bytes) {
    for_each_chunk(store.src + offset, bytes, store.map.swizzle,
                   [&](uint32_t place, uint32_t done, uint32_t part) {
                     if (!store.add) {
                       memcpy(dst + done, shared_.bytes(place), part);
                       return;
                     }
                     for (uint32_t i = 0; i < part; i += 4) {
                       float sum, more;
                       memcpy(&sum, dst + done + i, 4);
                       memcpy(&more, shared_.bytes(place + i), 4);
                       sum += more;
                       memcpy(dst + done + i, &sum, 4);
                     }
                   });
  });
}

// ---- the instructions' entry points ----

void check_tensor_map(const void* map, Site site) {
  std::string error;
  if (!checked(map, 0, error)) session->report("tensor map", site, error);
}
void tma_load(uint32_t dst, const void* map, const Coordinates& at, uint32_t mbarrier, Site site) {
  Block::current->tma_load(dst, map, at, mbarrier, site);
}
void tma_store(const void* map, uint32_t src, const Coordinates& at, bool add, Site site) {
  Block::current->tma_store(map, src, at, add, site);
}
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, Site site) {
  Block::current->bulk_load(dst, src, bytes, mbarrier, site);
}
void bulk_store(void* dst, uint32_t src, uint32_t bytes, Site site) {
  Block::current->bulk_store(dst, src, bytes, site);
}
void bulk_commit_group(Site) { Block::current->bulk_commit_group(); }
void bulk_wait_group(unsigned pending, bool only_read, Site site) {
  Block::current->bulk_wait_group(pending, only_read, site);
}

}  // namespace internvl::emulator
