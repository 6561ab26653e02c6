#include "wgmma.h"

#include "rounding.h"

namespace internvl::emulator {
namespace {

constexpr uint32_t kChunk = 16;
constexpr uint32_t kSpans[4] = {0, 128, 64, 32};  // by bits 62 and 63

using Row = float __attribute__((vector_size(32)));

// One row of sums, eight columns at a time.
INTERNVL_CLONES void multiply(float* sums, const float (*a)[16], const float* b, int n,
                              bool accumulate, const int* permutation, bool addend_last) {
  for (int i = 0; i < 64; ++i) {
    for (int column = 0; column < n; column += 8) {
      float* at = sums + i * n + column;
      Row addend{}, sum, columns;
      if (accumulate) memcpy(&addend, at, sizeof(Row));
      memcpy(&columns, b + permutation[0] * n + column, sizeof(Row));
      sum = a[i][permutation[0]] * columns;
      if (!addend_last) sum += addend;
      for (int k = 1; k < 16; ++k) {
        memcpy(&columns, b + permutation[k] * n + column, sizeof(Row));
        sum += a[i][permutation[k]] * columns;
      }
      if (addend_last) sum += addend;
      memcpy(at, &sum, sizeof(Row));
    }
  }
}

}  // namespace

MatrixOperand::MatrixOperand(uint64_t descriptor, bool mn_major)
    : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
      leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
      stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
      span(kSpans[descriptor >> 62]),
      mn_major(mn_major) {}

uint32_t MatrixOperand::chunk(uint32_t major, uint32_t minor) const {
  const uint32_t group = major / 8, row = major % 8;
  if (span == 0) {
    const uint32_t by_group = mn_major ? leading : stride, by_chunk = mn_major ? stride : leading;
    return start + group * by_group + row * kChunk + minor * by_chunk;
  }
  const uint32_t per_row = span / kChunk;
  const uint32_t across =
      mn_major ? minor / per_row * leading + minor % per_row * kChunk : minor * kChunk;
  const uint32_t linear = start + group * stride + row * span + across;
  return linear ^ (linear >> 3 & (span - kChunk));
}

std::string MatrixOperand::error(uint64_t descriptor, uint32_t extent) const {
  if (descriptor >> 49 & 7u) return "a base offset, which no layout here needs";
  if (span == 0) return {};
  const uint32_t group = 8 * span;
  if (start % group >= span)
    return "the start address is not in the first row of a group of eight (" +
           std::to_string(group) + " bytes)";
  if (!mn_major && start % span + 32 > span)
    return "k leaves the " + std::to_string(span) + " bytes that the swizzle spans";
  if (mn_major && start % span != 0) return "the start address is not at the begin of a row";
  if (extent > 8 && !mn_major && stride % group != 0)
    return "the stride is no multiple of a group of eight rows";
  if (mn_major && stride % group != 0) return "the stride is no multiple of a group of eight rows";
  if (mn_major && 2 * extent > span && leading % group != 0)
    return "the leading offset is no multiple of a group of eight rows";
  return {};
}

void widen_chunk(const uint8_t* chunk, bool is_bf16, float (&out)[8]) {
  uint16_t bits[8];
  memcpy(bits, chunk, sizeof bits);
  for (int i = 0; i < 8; ++i) out[i] = is_bf16 ? bf16_to_float(bits[i]) : fp16_to_float(bits[i]);
}

void wgmma_m64k16(float* sums, const float (*a)[16], const float* b, int n, bool accumulate,
                  const MmaOrder& order) {
  const Rounding rounding(order.toward_zero);
  multiply(sums, a, b, n, accumulate, order.permutation, order.addend_last);
}

}  // namespace internvl::emulator
