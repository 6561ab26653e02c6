// Loads, stores and atomics. T is plain data of 1, 2, 4, 8 or 16 bytes, aligned to its size.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
#pragma once

#include "cuda/ptx/types.cuh"

#if defined(INTERNVL_EMULATOR)

#include "emulator/memory.h"

#else

namespace internvl::ptx {

template <class T>
constexpr bool kLoadable =
    std::is_trivially_copyable_v<T> &&
    (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

// One load of T's size: ld.shared.
template <class T>
INTERNVL_PTX_FN T ld_shared(uint32_t addr) {
  static_assert(kLoadable<T>, "ld_shared takes plain data of 1, 2, 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 1) {
    uint32_t r;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(r) : "r"(addr) : "memory");
    return bits_as<T>(static_cast<uint8_t>(r));
  } else if constexpr (sizeof(T) == 2) {
    uint16_t r;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(addr) : "memory");
    return bits_as<T>(r);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(addr) : "memory");
    return bits_as<T>(r);
  } else if constexpr (sizeof(T) == 8) {
    U32x2 r;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "r"(addr) : "memory");
    return bits_as<T>(r);
  } else {
    U32x4 r;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(addr)
                 : "memory");
    return bits_as<T>(r);
  }
}

// One store of T's size: st.shared.
template <class T>
INTERNVL_PTX_FN void st_shared(uint32_t addr, const T& value) {
  static_assert(kLoadable<T>, "st_shared takes plain data of 1, 2, 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 1) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(addr), "r"(uint32_t{bits_as<uint8_t>(value)})
                 : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(addr), "h"(bits_as<uint16_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(addr), "r"(bits_as<uint32_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const U32x2 r = bits_as<U32x2>(value);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(addr), "r"(r.x), "r"(r.y) : "memory");
  } else {
    const U32x4 r = bits_as<U32x4>(value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(r.x), "r"(r.y),
                 "r"(r.z), "r"(r.w)
                 : "memory");
  }
}

// One load of T's size: ld.global.
template <class T>
INTERNVL_PTX_FN T ld_global(const T* src) {
  static_assert(kLoadable<T>, "ld_global takes plain data of 1, 2, 4, 8 or 16 bytes");
  const uint64_t addr = __cvta_generic_to_global(src);
  if constexpr (sizeof(T) == 1) {
    uint32_t r;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(r) : "l"(addr) : "memory");
    return bits_as<T>(static_cast<uint8_t>(r));
  } else if constexpr (sizeof(T) == 2) {
    uint16_t r;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(r) : "l"(addr) : "memory");
    return bits_as<T>(r);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t r;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(r) : "l"(addr) : "memory");
    return bits_as<T>(r);
  } else if constexpr (sizeof(T) == 8) {
    U32x2 r;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(addr) : "memory");
    return bits_as<T>(r);
  } else {
    U32x4 r;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(addr)
                 : "memory");
    return bits_as<T>(r);
  }
}

// One load of T's size of data that nobody writes while the kernel runs: ld.global.nc.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld-global-nc
template <class T>
INTERNVL_PTX_FN T ld_global_nc(const T* src) {
  static_assert(kLoadable<T>, "ld_global_nc takes plain data of 1, 2, 4, 8 or 16 bytes");
  const uint64_t addr = __cvta_generic_to_global(src);
  if constexpr (sizeof(T) == 1) {
    uint32_t r;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(r) : "l"(addr));
    return bits_as<T>(static_cast<uint8_t>(r));
  } else if constexpr (sizeof(T) == 2) {
    uint16_t r;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(r) : "l"(addr));
    return bits_as<T>(r);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t r;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r) : "l"(addr));
    return bits_as<T>(r);
  } else if constexpr (sizeof(T) == 8) {
    U32x2 r;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(addr));
    return bits_as<T>(r);
  } else {
    U32x4 r;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(addr));
    return bits_as<T>(r);
  }
}

// One store of T's size: st.global.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st
template <class T>
INTERNVL_PTX_FN void st_global(T* dst, const T& value) {
  static_assert(kLoadable<T>, "st_global takes plain data of 1, 2, 4, 8 or 16 bytes");
  const uint64_t addr = __cvta_generic_to_global(dst);
  if constexpr (sizeof(T) == 1) {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(addr), "r"(uint32_t{bits_as<uint8_t>(value)})
                 : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(addr), "h"(bits_as<uint16_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(addr), "r"(bits_as<uint32_t>(value)) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    const U32x2 r = bits_as<U32x2>(value);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(addr), "r"(r.x), "r"(r.y) : "memory");
  } else {
    const U32x4 r = bits_as<U32x4>(value);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(addr), "r"(r.x), "r"(r.y),
                 "r"(r.z), "r"(r.w)
                 : "memory");
  }
}

// Adds and returns the value before; orders the thread's (and, after a barrier, its block's) memory
// accesses with other blocks that use the same counter: atom.acq_rel.gpu.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-atom
INTERNVL_PTX_FN uint32_t atom_add_global(uint32_t* dst, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(dst)), "r"(value)
               : "memory");
  return before;
}

// Orders the thread's memory accesses before and after it, for all threads of the device.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar-fence
INTERNVL_PTX_FN void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace internvl::ptx

#endif
