// Twin of csrc/cuda/ptx/ldmatrix.cuh.
#pragma once

namespace internvl::ptx {

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr,
                        emulator::Site site = emulator::Site::here()) {
  emulator::LdmatrixArgs args{r, addr, 4, false};
  emulator::collective(emulator::Collective::kLdmatrix, &args, site);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr,
                              emulator::Site site = emulator::Site::here()) {
  emulator::LdmatrixArgs args{r, addr, 4, true};
  emulator::collective(emulator::Collective::kLdmatrix, &args, site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t addr,
                        emulator::Site site = emulator::Site::here()) {
  emulator::LdmatrixArgs args{r, addr, 2, false};
  emulator::collective(emulator::Collective::kLdmatrix, &args, site);
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr,
                              emulator::Site site = emulator::Site::here()) {
  emulator::LdmatrixArgs args{r, addr, 2, true};
  emulator::collective(emulator::Collective::kLdmatrix, &args, site);
}

}  // namespace internvl::ptx
