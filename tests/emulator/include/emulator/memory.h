// Twin of csrc/cuda/ptx/memory.cuh.
#pragma once

namespace internvl::ptx {

template <class T>
constexpr bool kLoadable =
    std::is_trivially_copyable_v<T> &&
    (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

template <class T>
inline T ld_shared(uint32_t addr, emulator::Site site = emulator::Site::here()) {
  static_assert(kLoadable<T>, "ld_shared takes plain data of 1, 2, 4, 8 or 16 bytes");
  T value;
  memcpy(&value, emulator::load_shared(addr, sizeof(T), site), sizeof(T));
  return value;
}

template <class T>
inline void st_shared(uint32_t addr, const T& value, emulator::Site site = emulator::Site::here()) {
  static_assert(kLoadable<T>, "st_shared takes plain data of 1, 2, 4, 8 or 16 bytes");
  memcpy(emulator::store_shared(addr, sizeof(T), site), &value, sizeof(T));
}

template <class T>
inline T ld_global(const T* src, emulator::Site site = emulator::Site::here()) {
  static_assert(kLoadable<T>, "ld_global takes plain data of 1, 2, 4, 8 or 16 bytes");
  T value;
  memcpy(&value, emulator::load_global(src, sizeof(T), false, site), sizeof(T));
  return value;
}

template <class T>
inline T ld_global_nc(const T* src, emulator::Site site = emulator::Site::here()) {
  static_assert(kLoadable<T>, "ld_global_nc takes plain data of 1, 2, 4, 8 or 16 bytes");
  T value;
  memcpy(&value, emulator::load_global(src, sizeof(T), true, site), sizeof(T));
  return value;
}

template <class T>
inline void st_global(T* dst, const T& value, emulator::Site site = emulator::Site::here()) {
  static_assert(kLoadable<T>, "st_global takes plain data of 1, 2, 4, 8 or 16 bytes");
  memcpy(emulator::store_global(dst, sizeof(T), site), &value, sizeof(T));
}

inline uint32_t atom_add_global(uint32_t* dst, uint32_t value,
                                emulator::Site site = emulator::Site::here()) {
  return emulator::atomic_add_global(dst, value, site);
}

inline void fence_acq_rel_gpu(emulator::Site site = emulator::Site::here()) {
  emulator::fence_gpu(site);
}

}  // namespace internvl::ptx
