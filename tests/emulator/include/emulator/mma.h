// Twin of csrc/cuda/ptx/mma.cuh.
#pragma once

namespace internvl::ptx {

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const float (&c)[4], emulator::Site site = emulator::Site::here()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>,
                "mma_m16n8k16 takes Bf16 or Fp16");
  emulator::MmaArgs args{d, a, b, c};
  emulator::collective(
      std::is_same_v<T, Bf16> ? emulator::Collective::kMmaBf16 : emulator::Collective::kMmaFp16,
      &args, site);
}

}  // namespace internvl::ptx
