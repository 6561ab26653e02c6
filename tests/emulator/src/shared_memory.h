// The shared memory of one block with a shadow of what each word's last accesses were.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "clocks.h"
#include "emulator/machine.h"

namespace internvl::emulator {

// What SharedMemory asks about reads and fences of the asynchronous proxy.
class AsyncProxy {
 public:
  // Was read `id` of the unit (a warpgroup's wgmma, or bulk stores) over before the actor's access?
  virtual bool read_over(uint32_t unit, uint32_t id, const Actor& actor) const = 0;
  // Where that read was issued, and by whom.
  virtual std::string read_text(uint32_t unit, uint32_t id) const = 0;
  // Lies a proxy fence between the write of a thread, after `fences` fences of its own, and the
  // actor's asynchronous access?
  virtual bool fenced(uint32_t writer, uint32_t clock, uint32_t fences,
                      const Actor& actor) const = 0;
  virtual uint32_t fences_of(uint32_t thread) const = 0;

 protected:
  ~AsyncProxy() = default;
};

constexpr uint32_t kMaxWarpgroups = kMaxWarps / 4;
constexpr uint32_t kBulkUnit = kMaxWarpgroups;  // reads by bulk stores
constexpr uint32_t kUnits = kMaxWarpgroups + 1;

class SharedMemory {
 public:
  void reset(uint32_t bytes, uint32_t warps, const AsyncProxy* async);
  // Checks an access and updates the shadow; the bytes, or scratch when there are none.
  const uint8_t* load(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);
  uint8_t* store(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);
  // A cp.async from its issue to its landing. False: nothing may land.
  bool begin_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);
  uint8_t* land_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);

  // A bulk copy of whole 16-byte chunks on behalf of an mbarrier, likewise.
  bool begin_bulk(uint32_t addr, uint32_t bytes, const Actor& actor, uint32_t writer,
                  uint32_t phase, Site site);
  uint8_t* land_bulk(uint32_t addr, uint32_t bytes);
  // 16 bytes that a wgmma or a bulk store will read. False: they are not there.
  bool begin_async_read(uint32_t addr, const Actor& actor, uint32_t unit, uint32_t id, Site site);
  const uint8_t* bytes(uint32_t addr) const { return &data_[addr - kSharedBase]; }

  // The words of an mbarrier: nothing else may touch them.
  bool claim_mbarrier(uint32_t addr, const Actor& actor, Site site);
  bool in_bounds(uint32_t addr, uint32_t bytes, uint32_t alignment, Site site,
                 const char* what) const;

 private:
  struct Word {
    uint32_t clock;   // of the last write
    uint32_t site;    // of the last write
    uint32_t fences;  // that the writer had made before
    uint16_t writer;  // thread, or writer_of_mbarrier
    uint8_t known;    // bytes that were ever written, one bit each
    uint8_t written;  // bytes of the last write
    bool pending;     // a copy is under way; writer, clock and site are of its issue
    bool read;        // some entry of reads_ is set
    bool async_read;  // some entry of async_reads_ is set
    bool mbarrier;
  };

  void check_word_read(uint32_t index, uint8_t mask, const Actor& actor, Site site);
  void check_word_write(uint32_t index, uint8_t mask, const Actor& actor, Site site);
  void check_earlier_reads(uint32_t index, uint8_t mask, const Actor& actor, Site site);
  void check_async_reads(uint32_t index, const Actor& actor, Site site);
  void check_fenced(const Word& word, uint32_t index, const Actor& actor, Site site);
  void set_written(Word& word, uint8_t mask, uint32_t writer, uint32_t clock, uint32_t site);
  void note_read(uint32_t index, uint8_t mask, const Actor& actor);
  void report_word(const char* kind, uint32_t index, Site site, const Actor& actor,
                   const char* sentence) const;
  void report_earlier_read(uint32_t index, uint32_t warp, Site site, const Actor& actor) const;
  static bool ordered(const Word& word, const Actor& actor) {
    return actor.knows(word.writer, word.clock);
  }

  std::vector<uint8_t> data_;
  std::vector<Word> words_;
  std::vector<uint32_t> reads_;  // [word][warp]: clock << 10 | bytes << 6 | lane, 32: several lanes
  std::vector<uint32_t> async_reads_;  // [word][unit]: id of the last read; empty until one comes
  const AsyncProxy* async_ = nullptr;
  uint32_t bytes_ = 0;
  uint32_t warps_ = 0;
  alignas(16) uint8_t scratch_[16];
};

// "thread 37 (warp 1, lane 5)" or "warp 1".
std::string text_of(const Actor& actor);

}  // namespace internvl::emulator
