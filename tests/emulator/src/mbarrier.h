// Barriers with transaction counts, and the bulk copies under way.
#pragma once

#include <cstdint>
#include <vector>

#include "clocks.h"
#include "emulator/machine.h"
#include "tensor_map.h"

namespace internvl::emulator {

struct MBarrier {
  uint32_t addr = 0;
  uint32_t index = 0;
  uint32_t count = 0;    // arrivals of a phase
  uint32_t pending = 0;  // arrivals that the current phase still waits for
  int64_t bytes = 0;     // that it still waits for; negative: came before they were announced
  uint32_t phase = 0;    // completed ones
  bool fenced = false;   // known to the units that copy
  uint32_t thread = 0, clock = 0;  // of the initialisation
  Site site{};
  Clocks arriving;   // what the arrivals of the current phase hand on
  Clocks completed;  // what those of all completed phases did
};

// A bulk load under way, or the arrival that follows a thread's cp.async.
struct Arriving {
  enum class Kind { kTensor, kRow, kAfterCopies } kind;
  uint32_t mbarrier;
  Site site;
  // kTensor, kRow
  uint32_t dst = 0, bytes = 0;
  TensorMapDescription map{};
  Coordinates at{};
  const void* src = nullptr;
  // kAfterCopies
  uint32_t thread = 0, clock = 0;
  size_t copies = 0;
  Clocks known{};
};

// A bulk store from its issue to the wait that lets it read its source.
struct BulkStore {
  uint32_t id;
  Site site;
  uint32_t src;
  TensorMapDescription map;  // rank 0: a row of bytes
  Coordinates at;
  void* dst;
  uint32_t bytes;
  bool add;
};

// Kept after the store itself, for later writers of its source.
struct BulkRead {
  Site site{};
  uint32_t thread = 0, clock = 0;
  bool over = false;
};

}  // namespace internvl::emulator
