// The emulator's tensor map: the description itself, in the 128 bytes.
#pragma once

#include "cuda/ptx/tensor_map.h"

namespace internvl::emulator {

struct TensorMapDescription {
  uint64_t magic;
  uint8_t* base;
  int64_t byte_strides[5];  // of every dimension
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t rank, type, swizzle, element_bytes;
};

static_assert(sizeof(TensorMapDescription) <= sizeof(ptx::TensorMap), "a tensor map has 128 bytes");

// Null when `map` was not made by encode_tensor_map().
const TensorMapDescription* description_of(const void* map);

}  // namespace internvl::emulator
