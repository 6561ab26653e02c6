// Twin of csrc/cuda/ptx/warp.cuh.
#pragma once

namespace internvl::ptx {

template <class T>
inline T shfl_bfly(T value, int lane_mask, emulator::Site site = emulator::Site::here()) {
  static_assert(sizeof(T) == 4, "shfl_bfly moves 4 bytes");
  emulator::ShuffleArgs args{bits_as<uint32_t>(value),
                             (emulator::lane_id() ^ static_cast<uint32_t>(lane_mask)) & 31u};
  emulator::collective(emulator::Collective::kShuffle, &args, site);
  return bits_as<T>(args.value);
}

template <class T>
inline T shfl_idx(T value, int lane, emulator::Site site = emulator::Site::here()) {
  static_assert(sizeof(T) == 4, "shfl_idx moves 4 bytes");
  emulator::ShuffleArgs args{bits_as<uint32_t>(value), static_cast<uint32_t>(lane) & 31u};
  emulator::collective(emulator::Collective::kShuffle, &args, site);
  return bits_as<T>(args.value);
}

inline bool vote_any(bool value, emulator::Site site = emulator::Site::here()) {
  emulator::VoteArgs args{value};
  emulator::collective(emulator::Collective::kVoteAny, &args, site);
  return args.value;
}

inline bool vote_all(bool value, emulator::Site site = emulator::Site::here()) {
  emulator::VoteArgs args{value};
  emulator::collective(emulator::Collective::kVoteAll, &args, site);
  return args.value;
}

}  // namespace internvl::ptx
