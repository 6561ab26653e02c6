#include "shared_memory.h"

#include <cstring>

#include "session.h"

namespace internvl::emulator {
namespace {

constexpr uint8_t kPoison = 0xff;  // NaN in every float format
constexpr uint32_t kSeveralLanes = 32;

uint8_t mask_of(uint32_t addr, uint32_t bytes) {
  return bytes >= 4 ? 0xf : static_cast<uint8_t>(((1u << bytes) - 1) << (addr & 3));
}

uint32_t lane_of(const Actor& actor) {
  return actor.thread == kWholeWarp ? kSeveralLanes : actor.thread % 32;
}

std::string thread_text(uint32_t thread) {
  if (thread >= writer_of_mbarrier(0)) return "a bulk copy";
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / 32) + ", lane " +
         std::to_string(thread % 32) + ")";
}

}  // namespace

std::string text_of(const Actor& actor) {
  return actor.thread == kWholeWarp ? "warp " + std::to_string(actor.warp)
                                    : thread_text(actor.thread);
}

void SharedMemory::reset(uint32_t bytes, uint32_t warps, const AsyncProxy* async) {
  bytes_ = bytes;
  warps_ = warps;
  async_ = async;
  const size_t words = (size_t{bytes} + 3) / 4;
  data_.assign(words * 4, kPoison);
  words_.assign(words, Word{});
  reads_.assign(words * warps, 0);
  async_reads_.clear();
}

bool SharedMemory::in_bounds(uint32_t addr, uint32_t bytes, uint32_t alignment, Site site,
                             const char* what) const {
  const auto offset = static_cast<int64_t>(addr) - kSharedBase;
  if (addr % alignment == 0 && offset >= 0 && offset + bytes <= int64_t{bytes_}) return true;
  const std::string place = std::string(what) + " of " + std::to_string(bytes) +
                            " bytes of shared memory at offset " + std::to_string(offset);
  if (addr % alignment != 0)
    session->report("misaligned", site,
                    place + " is not aligned to " +
                        (alignment == bytes ? "its size" : std::to_string(alignment) + " bytes"));
  else
    session->report("out of bounds", site,
                    place + "; the block has " + std::to_string(bytes_) + " bytes");
  return false;
}

void SharedMemory::report_word(const char* kind, uint32_t index, Site site, const Actor& actor,
                               const char* sentence) const {
  const Word& word = words_[index];
  std::string text =
      text_of(actor) + ", shared memory at offset " + std::to_string(4 * index) + ": " + sentence;
  if (word.known || word.pending)
    text += " by " + thread_text(word.writer) + " at " + session->site_text(word.site);
  session->report(kind, site, text);
}

void SharedMemory::report_earlier_read(uint32_t index, uint32_t warp, Site site,
                                       const Actor& actor) const {
  session->report("race", site,
                  text_of(actor) + ", shared memory at offset " + std::to_string(4 * index) +
                      ": written while warp " + std::to_string(warp) +
                      " may still be reading it: no barrier lies between");
}

void SharedMemory::note_read(uint32_t index, uint8_t mask, const Actor& actor) {
  uint32_t& entry = reads_[size_t{index} * warps_ + actor.warp];
  uint32_t lane = lane_of(actor), bytes = mask;
  if (entry >> 10 == actor.clock) {
    if ((entry & 63u) != lane) lane = kSeveralLanes;
    bytes |= entry >> 6 & 0xfu;
  }
  entry = actor.clock << 10 | bytes << 6 | lane;
  words_[index].read = true;
}

void SharedMemory::check_word_read(uint32_t index, uint8_t mask, const Actor& actor, Site site) {
  const Word& word = words_[index];
  if (word.pending)
    report_word("missing wait", index, site, actor, "read while a copy to it is under way, issued");
  else if ((word.known & mask) != mask)
    report_word("uninitialised", index, site, actor,
                word.known ? "read, but not all of it was ever written; last written"
                           : "read, but never written");
  else if ((word.written & mask) && !ordered(word, actor))
    report_word("race", index, site, actor,
                word.writer >= writer_of_mbarrier(0)
                    ? "read with no wait for the mbarrier after it was written"
                    : "read with no barrier after it was written");
  note_read(index, mask, actor);
}

void SharedMemory::check_word_write(uint32_t index, uint8_t mask, const Actor& actor, Site site) {
  const Word& word = words_[index];
  if (word.mbarrier)
    report_word("mbarrier", index, site, actor, "written, but holds an mbarrier, initialised");
  else if (word.pending)
    report_word("missing wait", index, site, actor,
                "written while a copy to it is under way, issued");
  else if ((word.written & mask) && !ordered(word, actor))
    report_word("race", index, site, actor, "written with no barrier after it was written");
  if (word.read) check_earlier_reads(index, mask, actor, site);
  if (word.async_read) check_async_reads(index, actor, site);
}

void SharedMemory::check_earlier_reads(uint32_t index, uint8_t mask, const Actor& actor,
                                       Site site) {
  words_[index].read = false;
  uint32_t* entries = &reads_[size_t{index} * warps_];
  for (uint32_t warp = 0; warp < warps_; ++warp) {
    const uint32_t entry = entries[warp];
    if (entry == 0) continue;
    const uint32_t clock = entry >> 10, bytes = entry >> 6 & 0xfu, lane = entry & 63u;
    bool conflict = (bytes & mask) && clock >= actor.known->before[warp];
    if (conflict && lane != kSeveralLanes) conflict = !actor.knows(warp * kLanes + lane, clock);
    if (warp == actor.warp) {
      const bool own = lane == lane_of(actor) && lane != kSeveralLanes;
      const bool parts = lane == kSeveralLanes && mask != 0xf;  // whose bytes is not recorded
      conflict = conflict && !own && !parts;
    }
    if (conflict) report_earlier_read(index, warp, site, actor);
    entries[warp] = 0;
  }
}

void SharedMemory::check_async_reads(uint32_t index, const Actor& actor, Site site) {
  words_[index].async_read = false;
  uint32_t* entries = &async_reads_[size_t{index} * kUnits];
  for (uint32_t unit = 0; unit < kUnits; ++unit) {
    const uint32_t id = entries[unit];
    if (id == 0) continue;
    entries[unit] = 0;
    if (async_->read_over(unit, id, actor)) continue;
    session->report("race", site,
                    text_of(actor) + ", shared memory at offset " + std::to_string(4 * index) +
                        ": written while " + async_->read_text(unit, id) +
                        " may still be reading it: no wait lies between");
  }
}

void SharedMemory::check_fenced(const Word& word, uint32_t index, const Actor& actor, Site site) {
  if (word.writer >= writer_of_mbarrier(0)) return;
  if (!async_->fenced(word.writer, word.clock, word.fences, actor))
    report_word("missing fence", index, site, actor,
                "used asynchronously with no fence.proxy.async after it was written");
}

void SharedMemory::set_written(Word& word, uint8_t mask, uint32_t writer, uint32_t clock,
                               uint32_t site) {
  const bool same = word.writer == writer && word.clock == clock;
  word.written = same ? word.written | mask : mask;
  word.known |= mask;
  word.writer = static_cast<uint16_t>(writer);
  word.clock = clock;
  word.site = site;
}

const uint8_t* SharedMemory::load(uint32_t addr, uint32_t bytes, const Actor& actor, Site site) {
  if (!in_bounds(addr, bytes, bytes, site, "load")) {
    memset(scratch_, kPoison, sizeof scratch_);
    return scratch_;
  }
  const uint32_t offset = addr - kSharedBase;
  const uint8_t mask = mask_of(offset, bytes);
  for (uint32_t at = offset / 4; at < (offset + bytes + 3) / 4; ++at) {
    const Word& word = words_[at];
    // The usual case, in one go: whole, landed, ordered.
    if (!word.pending && (word.known & mask) == mask && ordered(word, actor))
      note_read(at, mask, actor);
    else
      check_word_read(at, mask, actor, site);
  }
  return &data_[offset];
}

uint8_t* SharedMemory::store(uint32_t addr, uint32_t bytes, const Actor& actor, Site site) {
  if (!in_bounds(addr, bytes, bytes, site, "store")) return scratch_;
  const uint32_t offset = addr - kSharedBase, site_id = session->site_id(site);
  const uint32_t fences = async_->fences_of(actor.thread);
  const uint8_t mask = mask_of(offset, bytes);
  for (uint32_t at = offset / 4; at < (offset + bytes + 3) / 4; ++at) {
    check_word_write(at, mask, actor, site);
    set_written(words_[at], mask, actor.thread, actor.clock, site_id);
    words_[at].fences = fences;
  }
  return &data_[offset];
}

bool SharedMemory::begin_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site) {
  if (!in_bounds(addr, bytes, bytes, site, "cp.async")) return false;
  const uint32_t offset = addr - kSharedBase, site_id = session->site_id(site);
  for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) {
    check_word_write(at, 0xf, actor, site);
    set_written(words_[at], 0xf, actor.thread, actor.clock, site_id);
    words_[at].pending = true;
  }
  memset(&data_[offset], kPoison, bytes);
  return true;
}

uint8_t* SharedMemory::land_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site) {
  const uint32_t offset = addr - kSharedBase;
  const uint32_t site_id = session->site_id(site), fences = async_->fences_of(actor.thread);
  for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) {
    Word& word = words_[at];
    word.pending = false;
    word.writer = static_cast<uint16_t>(actor.thread);
    word.clock = actor.clock;
    word.site = site_id;
    word.fences = fences;
  }
  return &data_[offset];
}

bool SharedMemory::begin_bulk(uint32_t addr, uint32_t bytes, const Actor& actor, uint32_t writer,
                              uint32_t phase, Site site) {
  const uint32_t offset = addr - kSharedBase, site_id = session->site_id(site);
  for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) {
    Word& word = words_[at];
    check_word_write(at, 0xf, actor, site);
    if (word.known && !word.pending) check_fenced(word, at, actor, site);
    set_written(word, 0xf, writer, phase, site_id);
    word.pending = true;
  }
  memset(&data_[offset], kPoison, bytes);
  return true;
}

uint8_t* SharedMemory::land_bulk(uint32_t addr, uint32_t bytes) {
  const uint32_t offset = addr - kSharedBase;
  for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) words_[at].pending = false;
  return &data_[offset];
}

bool SharedMemory::begin_async_read(uint32_t addr, const Actor& actor, uint32_t unit, uint32_t id,
                                    Site site) {
  if (!in_bounds(addr, 16, 16, site, "asynchronous read")) return false;
  if (async_reads_.empty()) async_reads_.assign(words_.size() * kUnits, 0);
  const uint32_t first = (addr - kSharedBase) / 4;
  for (uint32_t at = first; at < first + 4; ++at) {
    Word& word = words_[at];
    const bool sound = !word.pending && word.known == 0xf && ordered(word, actor);
    if (sound)
      check_fenced(word, at, actor, site);
    else
      check_word_read(at, 0xf, actor, site);
    word.async_read = true;
    async_reads_[size_t{at} * kUnits + unit] = id;
  }
  return true;
}

bool SharedMemory::claim_mbarrier(uint32_t addr, const Actor& actor, Site site) {
  if (!in_bounds(addr, 8, 8, site, "mbarrier")) return false;
  const uint32_t first = (addr - kSharedBase) / 4;
  words_[first].mbarrier = words_[first + 1].mbarrier = false;
  store(addr, 8, actor, site);
  words_[first].mbarrier = words_[first + 1].mbarrier = true;
  return true;
}

}  // namespace internvl::emulator
