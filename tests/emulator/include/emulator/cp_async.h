// Twin of csrc/cuda/ptx/cp_async.cuh.
#pragma once

namespace internvl::ptx {

inline void cp_async_cg_16(uint32_t dst, const void* src, int src_bytes,
                           emulator::Site site = emulator::Site::here()) {
  emulator::copy_async(dst, src, 16, src_bytes, site);
}

inline void cp_async_ca_8(uint32_t dst, const void* src, int src_bytes,
                          emulator::Site site = emulator::Site::here()) {
  emulator::copy_async(dst, src, 8, src_bytes, site);
}

inline void cp_async_ca_4(uint32_t dst, const void* src, int src_bytes,
                          emulator::Site site = emulator::Site::here()) {
  emulator::copy_async(dst, src, 4, src_bytes, site);
}

inline void cp_async_commit_group(emulator::Site site = emulator::Site::here()) {
  emulator::commit_group(site);
}

template <int N>
inline void cp_async_wait_group(emulator::Site site = emulator::Site::here()) {
  static_assert(N >= 0, "cp_async_wait_group: N counts groups");
  emulator::wait_group(N, site);
}

}  // namespace internvl::ptx
