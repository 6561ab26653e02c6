#include "global_memory.h"

#include <algorithm>
#include <cstring>

#include "session.h"

namespace internvl::emulator {

GlobalMemory global_memory;

namespace {

uint8_t mask_of(size_t offset, size_t end, size_t word) {
  uint8_t mask = 0;
  for (size_t byte = std::max(offset, 4 * word); byte < std::min(end, 4 * word + 4); ++byte)
    mask |= static_cast<uint8_t>(1u << (byte & 3));
  return mask;
}

std::string block_text(uint32_t block) { return "block " + std::to_string(block); }

}  // namespace

void GlobalMemory::add(const std::string& name, void* base, size_t bytes, bool writable,
                       std::vector<uint8_t> known) {
  Allocation a{name, static_cast<uint8_t*>(base), bytes, writable, std::move(known), {}};
  if (writable) {
    if (a.known.empty()) a.known.assign(bytes, 1);
    a.words.assign((bytes + 3) / 4 + 1, Word{});
  }
  allocations_.push_back(std::move(a));
  last_ = nullptr;
}

void GlobalMemory::clear() {
  allocations_.clear();
  releases_.clear();
  last_ = nullptr;
}

void GlobalMemory::begin_launch() {
  ++launch_;
  releases_.clear();
}

std::string GlobalMemory::place(const Allocation& a, size_t offset,
                                const GlobalActor& actor) const {
  return block_text(actor.block) + ", " + text_of(actor.actor) + ", " + a.name + " at byte " +
         std::to_string(offset) + " of " + std::to_string(a.bytes);
}

GlobalMemory::Allocation* GlobalMemory::find(const void* ptr, uint32_t bytes, Site site,
                                             const GlobalActor& actor, const char* what) {
  const auto* at = static_cast<const uint8_t*>(ptr);
  const auto holds = [&](const Allocation& a) {
    return at >= a.base && at + bytes <= a.base + a.bytes;
  };
  // Views of one tensor interleave: the one that has an element there is meant.
  const auto means = [&](const Allocation& a) {
    return holds(a) && (a.writable || a.known.empty() || a.known[at - a.base]);
  };
  if (last_ && means(*last_)) return last_;
  for (Allocation& a : allocations_)
    if (means(a)) return last_ = &a;
  for (Allocation& a : allocations_)
    if (holds(a)) return &a;
  std::string nearest = "no memory of the launch";
  int64_t best = INT64_MAX;
  for (const Allocation& a : allocations_) {
    const int64_t below = a.base - at, above = at + bytes - (a.base + a.bytes);
    const int64_t distance = std::max(below, above);
    if (distance >= best) continue;
    best = distance;
    nearest = std::to_string(distance) + " bytes " +
              (below > above ? "before" : "past the end of") + " " + a.name;
  }
  session->report("out of bounds", site,
                  block_text(actor.block) + ", " + text_of(actor.actor) + ": " + what + " of " +
                      std::to_string(bytes) + " bytes of global memory, " + nearest);
  return nullptr;
}

bool GlobalMemory::aligned(const void* ptr, uint32_t bytes, Site site, const GlobalActor& actor) {
  if (reinterpret_cast<uintptr_t>(ptr) % bytes == 0) return true;
  session->report("misaligned", site,
                  block_text(actor.block) + ", " + text_of(actor.actor) + ": access of " +
                      std::to_string(bytes) + " bytes of global memory is not aligned to its size");
  return false;
}

bool GlobalMemory::ordered(const Access& access, const GlobalActor& by) const {
  if (access.launch != launch_) return true;
  const Actor& actor = by.actor;
  if (access.block == by.block) return actor.knows(access.thread, access.clock);
  for (const Acquired& acquired : *by.acquired) {
    const Release& release = acquired.release;
    if (release.block != access.block) continue;
    const bool mine = actor.knows(acquired.thread, acquired.clock);
    const bool before = access.clock < release.known[access.thread / 32] ||
                        (access.thread == release.thread && access.clock <= release.clock);
    if (mine && before) return true;
  }
  return false;
}

bool GlobalMemory::check_known(const Allocation& a, size_t offset, uint32_t bytes, Site site,
                               const GlobalActor& actor) {
  if (a.known.empty() || !memchr(&a.known[offset], 0, bytes)) return true;
  session->report("uninitialised", site,
                  place(a, offset, actor) + (a.writable ? ": read, but never written"
                                                        : ": read, but no element of the tensor"));
  return false;
}

void GlobalMemory::check_order_of_read(Allocation& a, size_t offset, uint32_t bytes, Site site,
                                       const GlobalActor& actor) {
  const size_t end = offset + bytes;
  for (size_t at = offset / 4; at < (end + 3) / 4; ++at) {
    Word& word = a.words[at];
    const uint8_t mask = mask_of(offset, end, at);
    if ((word.written & mask) && !ordered(word.write, actor))
      session->report(
          "race", site,
          place(a, 4 * at, actor) + ": read, but nothing orders it after the write of " +
              block_text(word.write.block) + ", thread " + std::to_string(word.write.thread) +
              " at " + session->site_text(word.site));
    word.read = {launch_, actor.block, actor.actor.thread, actor.actor.clock};
    word.seen = mask;
  }
}

const void* GlobalMemory::load(const void* src, uint32_t bytes, const GlobalActor& actor,
                               Site site) {
  memset(scratch_, 0xff, sizeof scratch_);
  if (!aligned(src, bytes, site, actor)) return scratch_;
  return check_read(src, bytes, actor, site) ? src : scratch_;
}

bool GlobalMemory::check_read(const void* src, uint32_t bytes, const GlobalActor& actor,
                              Site site) {
  Allocation* a = find(src, bytes, site, actor, "load");
  if (!a) return false;
  const size_t offset = static_cast<const uint8_t*>(src) - a->base;
  if (!check_known(*a, offset, bytes, site, actor)) return false;
  if (a->writable) check_order_of_read(*a, offset, bytes, site, actor);
  return true;
}

void GlobalMemory::check_unchanging(const void* src, const GlobalActor& actor, Site site) {
  const auto* at = static_cast<const uint8_t*>(src);
  for (const Allocation& a : allocations_) {
    if (!a.writable || at < a.base || at >= a.base + a.bytes) continue;
    const Word& word = a.words[(at - a.base) / 4];
    if (word.written && word.write.launch == launch_)
      session->report("race", site,
                      place(a, at - a.base, actor) +
                          ": ld.global.nc of what this launch wrote at " +
                          session->site_text(word.site));
  }
}

void* GlobalMemory::store(void* dst, uint32_t bytes, const GlobalActor& actor, Site site) {
  if (!aligned(dst, bytes, site, actor)) return scratch_;
  return check_write(dst, bytes, actor, site, false) ? dst : scratch_;
}

bool GlobalMemory::check_write(void* dst, uint32_t bytes, const GlobalActor& actor, Site site,
                               bool add) {
  Allocation* a = find(dst, bytes, site, actor, add ? "addition" : "store");
  if (!a) return false;
  const size_t offset = static_cast<uint8_t*>(dst) - a->base, end = offset + bytes;
  if (!a->writable) {
    session->report("written input", site, place(*a, offset, actor) + ": is not for writing");
    return false;
  }
  if (add && !check_known(*a, offset, bytes, site, actor)) return false;
  const uint32_t site_id = session->site_id(site);
  for (size_t at = offset / 4; at < (end + 3) / 4; ++at) {
    Word& word = a->words[at];
    const uint8_t mask = mask_of(offset, end, at);
    if ((word.written & mask) && !(add && word.added) && !ordered(word.write, actor))
      session->report(
          "race", site,
          place(*a, 4 * at, actor) + ": written, but nothing orders it after the write of " +
              block_text(word.write.block) + ", thread " + std::to_string(word.write.thread) +
              " at " + session->site_text(word.site));
    else if ((word.seen & mask) && !ordered(word.read, actor))
      session->report(
          "race", site,
          place(*a, 4 * at, actor) + ": written, but nothing orders it after the read of " +
              block_text(word.read.block) + ", thread " + std::to_string(word.read.thread));
    word.write = {launch_, actor.block, actor.actor.thread, actor.actor.clock};
    word.written = mask;
    word.added = add;
    word.seen &= static_cast<uint8_t>(~mask);
    word.site = site_id;
  }
  memset(&a->known[offset], 1, bytes);
  return true;
}

uint32_t* GlobalMemory::atomic(uint32_t* dst, const GlobalActor& actor, Site site,
                               const Release& release, std::vector<Acquired>& acquired) {
  auto* const nowhere = reinterpret_cast<uint32_t*>(scratch_);
  if (!aligned(dst, 4, site, actor)) return nowhere;
  Allocation* a = find(dst, 4, site, actor, "atomic operation");
  if (!a) return nowhere;
  const size_t offset = reinterpret_cast<uint8_t*>(dst) - a->base;
  if (!a->writable) {
    session->report("written input", site, place(*a, offset, actor) + ": is not for writing");
    return nowhere;
  }
  check_known(*a, offset, 4, site, actor);
  std::vector<Release>& before = releases_[dst];
  for (const Release& other : before)
    if (other.block != release.block)
      acquired.push_back({other, actor.actor.thread, actor.actor.clock});
  Word& word = a->words[offset / 4];
  if (word.written && !ordered(word.write, actor))
    session->report("race", site,
                    place(*a, offset, actor) +
                        ": atomic operation, but nothing orders it after the "
                        "plain write at " +
                        session->site_text(word.site));
  before.push_back(release);
  return dst;
}

size_t GlobalMemory::unwritten(const std::string& name) const {
  for (const Allocation& a : allocations_)
    if (a.name == name) return std::count(a.known.begin(), a.known.end(), 0);
  return 0;
}

}  // namespace internvl::emulator
