#include "emulator/arithmetic.h"
#include "rounding.h"

namespace internvl::emulator {
namespace {

using Row = float __attribute__((vector_size(32)));

// d [16][8] = a [16][16] * b [16][8] + c. Never fused: GCC is told so by -ffp-contract=off.
INTERNVL_CLONES void multiply(float (*d)[8], const float (*a)[16], const float (*b)[8],
                              const float (*c)[8], const int* permutation, bool addend_last) {
  Row columns[16];
  for (int n = 0; n < 16; ++n) memcpy(&columns[n], b[permutation[n]], sizeof(Row));
  for (int i = 0; i < 16; ++i) {
    Row addend, sum;
    memcpy(&addend, c[i], sizeof(Row));
    sum = addend_last ? a[i][permutation[0]] * columns[0]
                      : addend + a[i][permutation[0]] * columns[0];
    for (int n = 1; n < 16; ++n) sum += a[i][permutation[n]] * columns[n];
    if (addend_last) sum += addend;
    memcpy(d[i], &sum, sizeof(Row));
  }
}

template <bool kBf16>
void widen(uint32_t pair, float& lo, float& hi) {
  const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
  lo = kBf16 ? bf16_to_float(low) : fp16_to_float(low);
  hi = kBf16 ? bf16_to_float(high) : fp16_to_float(high);
}

// Fragments to matrices. Lane l: group g = l / 4 and t = l % 4; a: rows g, g + 8 and columns 2t,
// 2t + 1, then 8 further; b: rows 2t, 2t + 1, then 8 further, of column g.
template <bool kBf16>
void gather(float (*a_out)[16], float (*b_out)[8], const uint32_t* const a[32],
            const uint32_t* const b[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int r = 0; r < 4; ++r) {
      float* at = &a_out[g + 8 * (r % 2)][t + 8 * (r / 2)];
      widen<kBf16>(a[lane][r], at[0], at[1]);
    }
    for (int r = 0; r < 2; ++r)
      widen<kBf16>(b[lane][r], b_out[t + 8 * r][g], b_out[t + 8 * r + 1][g]);
  }
}

}  // namespace

void mma_m16n8k16(float* const d[32], const uint32_t* const a[32], const uint32_t* const b[32],
                  const float* const c[32], bool is_bf16, const MmaOrder& order) {
  float a_wide[16][16], b_wide[16][8], c_wide[16][8], d_wide[16][8];
  if (is_bf16)
    gather<true>(a_wide, b_wide, a, b);
  else
    gather<false>(a_wide, b_wide, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    memcpy(&c_wide[g][t], c[lane], 8);
    memcpy(&c_wide[g + 8][t], c[lane] + 2, 8);
  }
  {
    const Rounding rounding(order.toward_zero);
    multiply(d_wide, a_wide, b_wide, c_wide, order.permutation, order.addend_last);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    memcpy(d[lane], &d_wide[g][t], 8);
    memcpy(d[lane] + 2, &d_wide[g + 8][t], 8);
  }
}

}  // namespace internvl::emulator
