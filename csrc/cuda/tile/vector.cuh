// Rows of elements in vectors of 16 bytes, for kernels without tensor cores: loads, stores and
// conversion to fp32. Rows that are not made of whole, aligned vectors are read and written element
// by element.
#pragma once

#include "cuda/ptx/cvt.cuh"
#include "cuda/ptx/memory.cuh"

namespace internvl::tile {

template <class T>
constexpr int kVectorElements = 16 / static_cast<int>(sizeof(T));

template <class T>
INTERNVL_PTX_FN void unpack_vector(float (&x)[kVectorElements<T>], const ptx::U32x4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  INTERNVL_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (std::is_same_v<T, float>) {
      x[w] = ptx::bits_as<float>(words[w]);
    } else {
      const ptx::F32x2 pair = ptx::unpack2<T>(words[w]);
      x[2 * w] = pair.x;
      x[2 * w + 1] = pair.y;
    }
  }
}

template <class T>
INTERNVL_PTX_FN ptx::U32x4 pack_vector(const float (&x)[kVectorElements<T>]) {
  uint32_t words[4];
  INTERNVL_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (std::is_same_v<T, float>)
      words[w] = ptx::bits_as<uint32_t>(x[w]);
    else
      words[w] = ptx::pack2<T>(x[2 * w], x[2 * w + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Elements [d, d + kVectorElements) of a row; zeros beyond its width.
template <class T>
INTERNVL_PTX_FN ptx::U32x4 load_vector(const T* row, int64_t d, int64_t width, bool aligned) {
  if (d >= width) return {0, 0, 0, 0};
  if (aligned) return ptx::ld_global_nc(reinterpret_cast<const ptx::U32x4*>(row + d));
  uint32_t words[4] = {0, 0, 0, 0};
  INTERNVL_UNROLL
  for (int e = 0; e < kVectorElements<T>; ++e) {
    if (d + e >= width) continue;
    if constexpr (sizeof(T) == 4)
      words[e] = ptx::ld_global_nc(reinterpret_cast<const uint32_t*>(row + d + e));
    else
      words[e / 2] |= uint32_t{ptx::ld_global_nc(reinterpret_cast<const uint16_t*>(row + d + e))}
                      << (16 * (e % 2));
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class T>
INTERNVL_PTX_FN void store_vector(T* row, int64_t d, int64_t width, bool aligned,
                                  const ptx::U32x4& raw) {
  if (d >= width) return;
  if (aligned) return ptx::st_global(reinterpret_cast<ptx::U32x4*>(row + d), raw);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  INTERNVL_UNROLL
  for (int e = 0; e < kVectorElements<T>; ++e) {
    if (d + e >= width) continue;
    if constexpr (sizeof(T) == 4)
      ptx::st_global(reinterpret_cast<uint32_t*>(row + d + e), words[e]);
    else
      ptx::st_global(reinterpret_cast<uint16_t*>(row + d + e),
                     static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2))));
  }
}

}  // namespace internvl::tile
