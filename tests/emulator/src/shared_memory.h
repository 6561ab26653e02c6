// The shared memory of one block with a shadow of what each word's last accesses were.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/machine.h"

namespace internvl::emulator {

// Who acts: a thread, or a whole warp (ldmatrix), and what it knows of the other warps' progress.
// Accesses of warp w with a clock below known[w] happened before.
struct Actor {
  uint32_t thread;  // kWholeWarp: every lane of the warp
  uint32_t warp;
  uint32_t clock;
  const uint32_t* known;
};

constexpr uint32_t kWholeWarp = 0xffffu;

class SharedMemory {
 public:
  void reset(uint32_t bytes, uint32_t warps);
  // Checks an access and updates the shadow; the bytes, or scratch when there are none.
  const uint8_t* load(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);
  uint8_t* store(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);
  // A cp.async from its issue to its landing. False: nothing may land.
  bool begin_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);
  uint8_t* land_copy(uint32_t addr, uint32_t bytes, const Actor& actor, Site site);

 private:
  struct Word {
    uint32_t clock;   // of the last write
    uint32_t site;    // of the last write
    uint16_t writer;  // thread
    uint8_t known;    // bytes that were ever written, one bit each
    uint8_t written;  // bytes of the last write
    bool pending;     // a cp.async is under way; writer, clock and site are of its issue
    bool read;        // some entry of reads_ is set
  };

  bool in_bounds(uint32_t addr, uint32_t bytes, Site site, const char* what) const;
  void check_word_read(uint32_t index, uint8_t mask, const Actor& actor, Site site);
  void check_word_write(uint32_t index, uint8_t mask, const Actor& actor, Site site);
  void note_read(uint32_t index, uint8_t mask, const Actor& actor);
  void report_word(const char* kind, uint32_t index, Site site, const Actor& actor,
                   const char* sentence) const;
  void report_earlier_read(uint32_t index, uint32_t warp, Site site, const Actor& actor) const;
  static bool ordered(const Word& word, const Actor& actor) {
    return word.writer == actor.thread || word.clock < actor.known[word.writer / 32];
  }

  std::vector<uint8_t> data_;
  std::vector<Word> words_;
  std::vector<uint32_t> reads_;  // [word][warp]: clock << 10 | bytes << 6 | lane, 32: several lanes
  uint32_t bytes_ = 0;
  uint32_t warps_ = 0;
  alignas(16) uint8_t scratch_[16];
};

// "thread 37 (warp 1, lane 5)" or "warp 1".
std::string text_of(const Actor& actor);

}  // namespace internvl::emulator
