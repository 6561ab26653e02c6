// Twin of csrc/cuda/ptx/mbarrier.cuh.
#pragma once

namespace internvl::ptx {

inline void mbarrier_init(uint32_t addr, uint32_t arrivals,
                          emulator::Site site = emulator::Site::here()) {
  emulator::mbarrier_init(addr, arrivals, site);
}

inline void fence_mbarrier_init(emulator::Site site = emulator::Site::here()) {
  emulator::fence_mbarrier_init(site);
}

inline void mbarrier_arrive(uint32_t addr, emulator::Site site = emulator::Site::here()) {
  emulator::mbarrier_arrive(addr, site);
}

inline void mbarrier_expect_tx(uint32_t addr, uint32_t bytes,
                               emulator::Site site = emulator::Site::here()) {
  emulator::mbarrier_expect_tx(addr, bytes, site);
}

inline void mbarrier_arrive_expect_tx(uint32_t addr, uint32_t bytes,
                                      emulator::Site site = emulator::Site::here()) {
  emulator::mbarrier_expect_tx(addr, bytes, site);
  emulator::mbarrier_arrive(addr, site);
}

inline bool mbarrier_try_wait_parity(uint32_t addr, uint32_t parity,
                                     emulator::Site site = emulator::Site::here()) {
  return emulator::mbarrier_try_wait(addr, parity, site);
}

inline void mbarrier_wait_parity(uint32_t addr, uint32_t parity,
                                 emulator::Site site = emulator::Site::here()) {
  emulator::mbarrier_wait(addr, parity, site);
}

inline void cp_async_mbarrier_arrive_noinc(uint32_t addr,
                                           emulator::Site site = emulator::Site::here()) {
  emulator::mbarrier_arrive_after_copies(addr, site);
}

inline void fence_proxy_async_shared(emulator::Site site = emulator::Site::here()) {
  emulator::fence_proxy_async(site);
}

}  // namespace internvl::ptx
