// Which instruction sets were compiled in, and which of them this processor runs.
#pragma once

namespace internvl::cpu {

enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

struct IsaRow {
  Isa isa;
  const char* name;
  const char* features;  // what the processor must have, for people
  int lanes;
  bool compiled;
  bool (*supported)();
};

constexpr int kIsaRows = 4;
extern const IsaRow kIsaTable[kIsaRows];  // best last

// The row to use when `wanted` (INTERNVL_CPU_ISA) is null or empty: the best that runs here.
// Otherwise the row of that name; null when it is unknown, not compiled or not supported.
const IsaRow* choose_isa(const char* wanted);

}  // namespace internvl::cpu
