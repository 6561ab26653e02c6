// The tensors and workspaces a launch may touch, with a shadow of who wrote what.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace internvl::emulator {

// What one atomic operation hands on: the accesses that happened before it.
struct Release {
  uint32_t block;
  uint32_t thread;
  uint32_t clock;
  std::vector<uint32_t> known;  // per warp of that block
};

// A release that the block has seen, and since when.
struct Acquired {
  Release release;
  uint32_t thread;
  uint32_t clock;
};

struct GlobalActor {
  Actor actor;
  uint32_t block;
  const std::vector<Acquired>* acquired;  // by this block
};

class GlobalMemory {
 public:
  // known: one byte per byte of memory, 1 = holds a value; empty = all do. A gap that belongs to no
  // element of a strided view is simply not known.
  void add(const std::string& name, void* base, size_t bytes, bool writable,
           std::vector<uint8_t> known);
  void clear();
  void begin_launch();

  const void* load(const void* src, uint32_t bytes, const GlobalActor& actor, Site site);
  void* store(void* dst, uint32_t bytes, const GlobalActor& actor, Site site);
  // Checks a read of any length without alignment of its own (the source of an asynchronous copy).
  bool check_read(const void* src, uint32_t bytes, const GlobalActor& actor, Site site);
  // A write likewise. `add`: an atomic addition to what is there; those need no order among them.
  bool check_write(void* dst, uint32_t bytes, const GlobalActor& actor, Site site, bool add);
  // ld.global.nc: nobody may have written there in this launch, ordered or not.
  void check_unchanging(const void* src, const GlobalActor& actor, Site site);
  // The word an atomic operation works on, or scratch; hands out and takes the releases.
  uint32_t* atomic(uint32_t* dst, const GlobalActor& actor, Site site, const Release& release,
                   std::vector<Acquired>& acquired);

  // Bytes of an allocation that nobody has written.
  size_t unwritten(const std::string& name) const;

 private:
  struct Access {
    uint32_t launch, block, thread, clock;
  };
  struct Word {
    Access write{}, read{};
    uint32_t site = 0;
    uint8_t written = 0;  // bytes of the last write
    uint8_t seen = 0;     // bytes of the last read
    bool added = false;   // the last write was an addition
  };
  struct Allocation {
    std::string name;
    uint8_t* base;
    size_t bytes;
    bool writable;
    std::vector<uint8_t> known;
    std::vector<Word> words;  // writable ones
  };

  Allocation* find(const void* ptr, uint32_t bytes, Site site, const GlobalActor& actor,
                   const char* what);
  bool aligned(const void* ptr, uint32_t bytes, Site site, const GlobalActor& actor);
  bool check_known(const Allocation& a, size_t offset, uint32_t bytes, Site site,
                   const GlobalActor& actor);
  void check_order_of_read(Allocation& a, size_t offset, uint32_t bytes, Site site,
                           const GlobalActor& actor);
  bool ordered(const Access& access, const GlobalActor& actor) const;
  std::string place(const Allocation& a, size_t offset, const GlobalActor& actor) const;

  std::vector<Allocation> allocations_;
  Allocation* last_ = nullptr;
  std::map<const void*, std::vector<Release>> releases_;  // by atomic word, of this launch
  uint32_t launch_ = 0;
  alignas(16) uint8_t scratch_[16];
};

extern GlobalMemory global_memory;

}  // namespace internvl::emulator
