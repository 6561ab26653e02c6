// Twin of csrc/cuda/ptx/wgmma.cuh.
#pragma once

namespace internvl::ptx {

template <class T, int N, Major kA, Major kB>
inline void wgmma_ss(float (&d)[N / 2], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
                     emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "wgmma takes Bf16 or Fp16");
  static_assert(kWgmmaColumns<N>, "N is 8 or a multiple of 16 up to 256");
  emulator::WgmmaArgs args{
      d,          nullptr,          a.bits,          b.bits, N, std::is_same_v<T, Bf16>,
      accumulate, kA == Major::kMN, kB == Major::kMN};
  emulator::collective(emulator::Collective::kWgmma, &args, site);
}

template <class T, int N, Major kB>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], MatrixDescriptor b, bool accumulate,
                     emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>, "wgmma takes Bf16 or Fp16");
  static_assert(kWgmmaColumns<N>, "N is 8 or a multiple of 16 up to 256");
  emulator::WgmmaArgs args{
      d, a, 0, b.bits, N, std::is_same_v<T, Bf16>, accumulate, false, kB == Major::kMN};
  emulator::collective(emulator::Collective::kWgmma, &args, site);
}

inline void wgmma_fence(emulator::Site site = emulator::Site::here()) {
  emulator::collective(emulator::Collective::kWgmmaFence, nullptr, site);
}

inline void wgmma_commit_group(emulator::Site site = emulator::Site::here()) {
  emulator::collective(emulator::Collective::kWgmmaCommit, nullptr, site);
}

template <int N>
inline void wgmma_wait_group(emulator::Site site = emulator::Site::here()) {
  static_assert(N >= 0 && N <= 7, "wgmma_wait_group: N counts groups, at most 7");
  emulator::WgmmaWaitArgs args{N};
  emulator::collective(emulator::Collective::kWgmmaWait, &args, site);
}

inline void fence_operand(float&) {}
inline void fence_operand(uint32_t&) {}

}  // namespace internvl::ptx
