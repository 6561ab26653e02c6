// Twin of csrc/cuda/ptx/tma.cuh.
#pragma once

namespace internvl::ptx {

inline void prefetch_tensor_map(const TensorMap* map,
                                emulator::Site site = emulator::Site::here()) {
  emulator::check_tensor_map(map, site);
}

inline void tma_load_4d(uint32_t dst, const TensorMap* map, int c0, int c1, int c2, int c3,
                        uint32_t mbarrier, emulator::Site site = emulator::Site::here()) {
  emulator::tma_load(dst, map, {4, {c0, c1, c2, c3, 0}}, mbarrier, site);
}

inline void tma_load_5d(uint32_t dst, const TensorMap* map, int c0, int c1, int c2, int c3, int c4,
                        uint32_t mbarrier, emulator::Site site = emulator::Site::here()) {
  emulator::tma_load(dst, map, {5, {c0, c1, c2, c3, c4}}, mbarrier, site);
}

inline void tma_store_4d(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3,
                         emulator::Site site = emulator::Site::here()) {
  emulator::tma_store(map, src, {4, {c0, c1, c2, c3, 0}}, false, site);
}

inline void tma_store_5d(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3, int c4,
                         emulator::Site site = emulator::Site::here()) {
  emulator::tma_store(map, src, {5, {c0, c1, c2, c3, c4}}, false, site);
}

inline void tma_reduce_add_4d(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3,
                              emulator::Site site = emulator::Site::here()) {
  emulator::tma_store(map, src, {4, {c0, c1, c2, c3, 0}}, true, site);
}

inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier,
                      emulator::Site site = emulator::Site::here()) {
  emulator::bulk_load(dst, src, bytes, mbarrier, site);
}

inline void bulk_store(void* dst, uint32_t src, uint32_t bytes,
                       emulator::Site site = emulator::Site::here()) {
  emulator::bulk_store(dst, src, bytes, site);
}

inline void bulk_commit_group(emulator::Site site = emulator::Site::here()) {
  emulator::bulk_commit_group(site);
}

template <int N>
inline void bulk_wait_group(emulator::Site site = emulator::Site::here()) {
  static_assert(N >= 0, "bulk_wait_group: N counts groups");
  emulator::bulk_wait_group(N, false, site);
}

template <int N>
inline void bulk_wait_group_read(emulator::Site site = emulator::Site::here()) {
  static_assert(N >= 0, "bulk_wait_group_read: N counts groups");
  emulator::bulk_wait_group(N, true, site);
}

}  // namespace internvl::ptx
