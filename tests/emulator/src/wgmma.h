// Operands of wgmma: descriptors interpreted, and the arithmetic.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/arithmetic.h"

namespace internvl::emulator {

// An operand in shared memory, as its descriptor has it: where its 16-byte chunks are. K-major:
// chunk `minor` (0, 1) of row `major` (m or n) holds k = 8 * minor and on. MN-major: chunk `minor`
// of row `major` (k, 0 to 15) holds m or n = 8 * minor and on.
struct MatrixOperand {
  uint32_t start, leading, stride;
  uint32_t span;  // bytes that the swizzle permutes; 0: none
  bool mn_major;

  MatrixOperand(uint64_t descriptor, bool mn_major);
  uint32_t chunk(uint32_t major, uint32_t minor) const;
  // What the documentation does not allow, for `extent` rows or columns; empty when it is sound.
  std::string error(uint64_t descriptor, uint32_t extent) const;
};

// 8 packed 16-bit elements.
void widen_chunk(const uint8_t* chunk, bool is_bf16, float (&out)[8]);

// sums [64][n] = a [64][16] * b [16][n] (+ sums). Products are exact; sums follow `order`.
void wgmma_m64k16(float* sums, const float (*a)[16], const float* b, int n, bool accumulate,
                  const MmaOrder& order);

}  // namespace internvl::emulator
