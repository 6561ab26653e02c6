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
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / 32) + ", lane " +
         std::to_string(thread % 32) + ")";
}

}  // namespace

std::string text_of(const Actor& actor) {
  return actor.thread == kWholeWarp ? "warp " + std::to_string(actor.warp)
                                    : thread_text(actor.thread);
}

void SharedMemory::reset(uint32_t bytes, uint32_t warps) {
  bytes_ = bytes;
  warps_ = warps;
  const size_t words = (size_t{bytes} + 3) / 4;
  data_.assign(words * 4, kPoison);
  words_.assign(words, Word{});
  reads_.assign(words * warps, 0);
}

bool SharedMemory::in_bounds(uint32_t addr, uint32_t bytes, Site site, const char* what) const {
  const auto offset = static_cast<int64_t>(addr) - kSharedBase;
  if (addr % bytes != 0) {
    session->report("misaligned", site,
                    std::string(what) + " of " + std::to_string(bytes) +
                        " bytes of shared memory at offset " + std::to_string(offset) +
                        " is not aligned to its size");
    return false;
  }
  if (offset < 0 || offset + bytes > int64_t{bytes_}) {
    session->report("out of bounds", site,
                    std::string(what) + " of " + std::to_string(bytes) +
                        " bytes of shared memory at offset " + std::to_string(offset) +
                        "; the block has " + std::to_string(bytes_) + " bytes");
    return false;
  }
  return true;
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
    report_word("missing wait", index, site, actor,
                "read while a cp.async to it is under way, issued");
  else if ((word.known & mask) != mask)
    report_word("uninitialised", index, site, actor,
                word.known ? "read, but not all of it was ever written; last written"
                           : "read, but never written");
  else if ((word.written & mask) && !ordered(word, actor))
    report_word("race", index, site, actor, "read with no barrier after it was written");
  note_read(index, mask, actor);
}

void SharedMemory::check_word_write(uint32_t index, uint8_t mask, const Actor& actor, Site site) {
  Word& word = words_[index];
  if (word.pending)
    report_word("missing wait", index, site, actor,
                "written while a cp.async to it is under way, issued");
  else if ((word.written & mask) && !ordered(word, actor))
    report_word("race", index, site, actor, "written with no barrier after it was written");
  if (!word.read) return;
  word.read = false;
  uint32_t* entries = &reads_[size_t{index} * warps_];
  for (uint32_t warp = 0; warp < warps_; ++warp) {
    const uint32_t entry = entries[warp];
    if (entry == 0) continue;
    const uint32_t clock = entry >> 10, bytes = entry >> 6 & 0xfu, lane = entry & 63u;
    bool conflict = (bytes & mask) && clock >= actor.known[warp];
    if (warp == actor.warp) {
      const bool own = lane == lane_of(actor) && lane != kSeveralLanes;
      const bool parts = lane == kSeveralLanes && mask != 0xf;  // whose bytes is not recorded
      conflict = conflict && !own && !parts;
    }
    if (conflict) report_earlier_read(index, warp, site, actor);
    entries[warp] = 0;
  }
}

const uint8_t* SharedMemory::load(uint32_t addr, uint32_t bytes, const Actor& actor, Site site) {
  if (!in_bounds(addr, bytes, site, "load")) {
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
  if (!in_bounds(addr, bytes, site, "store")) return scratch_;
  const uint32_t offset = addr - kSharedBase, site_id = session->site_id(site);
  const uint8_t mask = mask_of(offset, bytes);
  for (uint32_t at = offset / 4; at < (offset + bytes + 3) / 4; ++at) {
    check_word_write(at, mask, actor, site);
    Word& word = words_[at];
    const bool same = word.writer == actor.thread && word.clock == actor.clock;
    word.written = same ? word.written | mask : mask;
    word.known |= mask;
    word.writer = static_cast<uint16_t>(actor.thread);
    word.clock = actor.clock;
    word.site = site_id;
  }
  return &data_[offset];
}

bool SharedMemory::begin_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site) {
  if (!in_bounds(addr, bytes, site, "cp.async")) return false;
  const uint32_t offset = addr - kSharedBase, site_id = session->site_id(site);
  for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) {
    check_word_write(at, 0xf, actor, site);
    Word& word = words_[at];
    word.pending = true;
    word.written = word.known = 0xf;
    word.writer = static_cast<uint16_t>(actor.thread);
    word.clock = actor.clock;
    word.site = site_id;
  }
  memset(&data_[offset], kPoison, bytes);
  return true;
}

uint8_t* SharedMemory::land_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site) {
  const uint32_t offset = addr - kSharedBase;
  const uint32_t site_id = session->site_id(site);
  for (uint32_t at = offset / 4; at < (offset + bytes) / 4; ++at) {
    Word& word = words_[at];
    word.pending = false;
    word.writer = static_cast<uint16_t>(actor.thread);
    word.clock = actor.clock;
    word.site = site_id;
  }
  return &data_[offset];
}

}  // namespace internvl::emulator
