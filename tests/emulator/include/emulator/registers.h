// Twin of csrc/cuda/ptx/registers.cuh.
#pragma once

namespace internvl::ptx {

template <int N>
constexpr bool kRegisterCount = N >= 24 && N <= 256 && N % 8 == 0;

template <int N>
inline void set_max_registers_inc(emulator::Site site = emulator::Site::here()) {
  static_assert(kRegisterCount<N>, "multiples of 8 from 24 to 256");
  emulator::RegisterArgs args{N, true};
  emulator::collective(emulator::Collective::kSetMaxRegisters, &args, site);
}

template <int N>
inline void set_max_registers_dec(emulator::Site site = emulator::Site::here()) {
  static_assert(kRegisterCount<N>, "multiples of 8 from 24 to 256");
  emulator::RegisterArgs args{N, false};
  emulator::collective(emulator::Collective::kSetMaxRegisters, &args, site);
}

}  // namespace internvl::ptx
