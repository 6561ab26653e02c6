// Element tags and register groups. Plain data on both sides: the arithmetic is in cvt.cuh and
// mma.cuh.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/ptx/device.cuh"

namespace internvl::ptx {

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

struct alignas(8) U32x2 {
  uint32_t x, y;
};

struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};

struct alignas(8) F32x2 {
  float x, y;
};

struct alignas(16) F32x4 {
  float x, y, z, w;
};

// The same bits as another type of the same size.
template <class To, class From>
INTERNVL_PTX_FN To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the number of bytes");
  static_assert(std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>,
                "bits_as copies plain data");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

}  // namespace internvl::ptx
