// Tasks of unequal length over PyTorch's threads, and the memory they work in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace internvl::cpu {

// 64-byte aligned floats. Small buffers are kept by the calling thread for its next call: fresh
// pages cost more than a small attention.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats <= kKept) {
      thread_local Memory kept;
      thread_local bool in_use = false;
      if (!in_use) {
        if (!kept) kept = allocate(kKept);
        in_use_ = &in_use;
        in_use = true;
        data_ = kept.get();
        return;
      }
    }
    own_ = allocate(floats);
    data_ = own_.get();
  }
  ~Scratch() {
    if (in_use_) *in_use_ = false;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

 private:
  static constexpr int64_t kKept = 1 << 18;  // 1 MiB
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<float, Free>;

  static Memory allocate(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    float* p = static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!p) throw std::bad_alloc();
    return Memory(p);
  }

  Memory own_;
  bool* in_use_ = nullptr;
  float* data_ = nullptr;
};

// Calls body(task, scratch) for every task in [0, tasks), in this order but for the threads:
// whoever is free takes the next one. Each worker has `scratch_floats` of its own. `flops` keeps
// small calls on the calling thread.
template <class Body>
void run_tasks(int64_t tasks, int64_t scratch_floats, double flops, const Body& body) {
  constexpr double kWorthAThread = 2e5;  // waking a pool costs some microseconds
  if (tasks <= 0) return;
  int64_t workers =
      flops < kWorthAThread ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
  workers = workers < tasks ? workers : tasks;
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const Scratch scratch(workers * stride);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, scratch.data());
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1))
        body(task, scratch.data() + worker * stride);
  });
}

}  // namespace internvl::cpu
