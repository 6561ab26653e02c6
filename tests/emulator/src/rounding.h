#pragma once

#include <cfenv>

namespace internvl::emulator {

// Rounds toward zero while it lives.
struct Rounding {
  explicit Rounding(bool toward_zero) : before(toward_zero ? std::fegetround() : -1) {
    if (toward_zero) std::fesetround(FE_TOWARDZERO);
  }
  ~Rounding() {
    if (before >= 0) std::fesetround(before);
  }
  int before;
};

}  // namespace internvl::emulator

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define INTERNVL_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define INTERNVL_CLONES
#endif
