// Tensor maps: what the unit that copies tiles (ptx/tma.cuh) knows of a tensor. Made on the host.
// https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html
#pragma once

#include <cstdint>
#include <string>

#include "cuda/launch_status.h"

namespace internvl::ptx {

// How the 16-byte chunks of a row of up to 32, 64 or 128 bytes are permuted in shared memory: bits
// 4 and up of the address are XORed with bits 7 and up (1, 2 or 3 of them). The address counts, so
// tiles begin at multiples of 256, 512 or 1024 bytes.
enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// The 128 bytes that the hardware reads; kernels get them inside of a `const __grid_constant__`
// parameter (INTERNVL_GRID_CONSTANT), whose address tma.cuh takes.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

enum class TensorMapType : int { kBf16, kFp16, kFp32 };

constexpr int element_bytes(TensorMapType type) { return type == TensorMapType::kFp32 ? 4 : 2; }

constexpr int kMaxTensorMapRank = 5;

// A tensor of `rank` dimensions, innermost (contiguous) first, and the box that one copy moves.
// What lies outside of the tensor is read as zero, and not written.
struct TensorMapShape {
  TensorMapType type = TensorMapType::kBf16;
  int rank = 4;
  int64_t sizes[kMaxTensorMapRank] = {1, 1, 1, 1, 1};
  int64_t byte_strides[kMaxTensorMapRank - 1] = {};  // of dimensions 1, 2, ...
  int box[kMaxTensorMapRank] = {1, 1, 1, 1, 1};
  Swizzle swizzle = Swizzle::k128;
};

// Why no tensor map can describe this; empty when one can. Byte strides of dimensions of size 1 do
// not matter.
std::string tensor_map_error(const void* base, const TensorMapShape& shape);

// Writes the map, or says why not. The driver is looked up at the first call.
LaunchStatus encode_tensor_map(const void* base, const TensorMapShape& shape, TensorMap* map);

}  // namespace internvl::ptx
