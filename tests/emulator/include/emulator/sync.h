// Twin of csrc/cuda/ptx/sync.cuh.
#pragma once

namespace internvl::ptx {

inline void sync_threads(emulator::Site site = emulator::Site::here()) {
  emulator::BarrierArgs args{0, 0, false};
  emulator::collective(emulator::Collective::kBarSync, &args, site);
}

inline void bar_sync(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::BarrierArgs args{id, threads, false};
  emulator::collective(emulator::Collective::kBarSync, &args, site);
}

inline void bar_arrive(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::BarrierArgs args{id, threads, false};
  emulator::collective(emulator::Collective::kBarArrive, &args, site);
}

template <int kId, int kThreads>
struct FixedBarrier {
  static void sync(emulator::Site site = emulator::Site::here()) {
    if constexpr (kId == 0)
      sync_threads(site);
    else
      bar_sync(kId, kThreads, site);
  }
};

inline bool sync_threads_or(bool value, emulator::Site site = emulator::Site::here()) {
  emulator::BarrierArgs args{0, 0, value};
  emulator::collective(emulator::Collective::kBarOr, &args, site);
  return args.value;
}

inline bool sync_threads_and(bool value, emulator::Site site = emulator::Site::here()) {
  emulator::BarrierArgs args{0, 0, value};
  emulator::collective(emulator::Collective::kBarAnd, &args, site);
  return args.value;
}

inline void sync_warp(emulator::Site site = emulator::Site::here()) {
  emulator::collective(emulator::Collective::kSyncWarp, nullptr, site);
}

}  // namespace internvl::ptx
