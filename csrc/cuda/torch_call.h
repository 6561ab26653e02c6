// What the CUDA operators share at the binding line: device, stream, working memory, exceptions.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>

#include "common/outputs.h"
#include "cuda/device.h"

namespace internvl::cuda {

// Of a launch or of a device: std::runtime_error reaches Python as RuntimeError.
inline void raise(const LaunchStatus& status) {
  if (!status.ok()) throw std::runtime_error(status.error);
}

// PyTorch's current stream of a device. Its function lives in a library that only CUDA builds of
// PyTorch have and have loaded by the time a CUDA tensor exists: looked up once, never linked.
inline void* current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library
               ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
               : nullptr;
  }();
  if (!function) throw std::runtime_error("this PyTorch has no CUDA support");
  void* stream = nullptr;
  if (function(device, &stream) != 0)
    throw std::runtime_error("PyTorch did not tell its current CUDA stream");
  return stream;
}

// The dispatcher comes here when any tensor is on a CUDA device; `name` names the one that leads.
inline int cuda_index(const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda())
    throw std::invalid_argument(std::string(name) +
                                " is not on a CUDA device; other arguments are");
  return tensor.get_device_index();
}

// The device of `like` made current, what launches need to know of it, and its stream.
class Call {
 public:
  Call(const char* name, const Tensor& like)
      : like_(like), index_(cuda_index(name, like)), guard_(index_) {
    raise(use_device(index_, &device_));
    stream_ = current_stream(index_);
  }

  const DeviceInfo& device() const { return device_; }
  void* stream() const { return stream_; }

  // Uninitialised, from PyTorch's allocator (256-byte aligned); freed in stream order.
  void* workspace(int64_t bytes) {
    if (bytes == 0) return nullptr;
    memory_ = torch::stable::new_empty(like_, {bytes}, torch::headeronly::ScalarType::Byte);
    return memory_->mutable_data_ptr();
  }

 private:
  const Tensor like_;
  const int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  DeviceInfo device_;
  void* stream_ = nullptr;
  OptionalTensor memory_;
};

}  // namespace internvl::cuda
