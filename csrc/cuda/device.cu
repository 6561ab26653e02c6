#include <cuda_runtime.h>

#include <mutex>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernel_table.h"

namespace internvl::cuda {
namespace {

struct Answer {
  bool asked = false;
  DeviceInfo device;
  LaunchStatus status;
};

LaunchStatus refusal(cudaError_t error) {
  std::string text =
      std::string("the CUDA kernels cannot use the device: ") + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver)
    text += " (built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
            std::to_string(CUDART_VERSION % 1000 / 10) + "; update the driver)";
  return {text};
}

Answer ask(int index) {
  Answer answer;
  answer.asked = true;
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } questions[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &answer.device.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &answer.device.max_shared_bytes},
  };
  for (const auto& question : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, index);
    if (error != cudaSuccess) {
      cudaGetLastError();  // a refusal must not appear as the error of a later launch
      answer.status = refusal(error);
      return answer;
    }
  }
  answer.device.compute_capability = 10 * major + minor;
  if (answer.device.compute_capability < kMinComputeCapability)
    answer.status = {"the CUDA kernels need compute capability 8.0 or newer; device " +
                     std::to_string(index) + " has " + std::to_string(major) + "." +
                     std::to_string(minor)};
  return answer;
}

}  // namespace

LaunchStatus use_device(int index, DeviceInfo* device) {
  static std::mutex mutex;
  static std::vector<Answer> answers;
  if (index < 0) return {"the CUDA kernels got a tensor without a device index"};
  const cudaError_t error = cudaSetDevice(index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return refusal(error);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (answers.size() <= static_cast<size_t>(index)) answers.resize(index + 1);
  if (!answers[index].asked) answers[index] = ask(index);
  *device = answers[index].device;
  return answers[index].status;
}

}  // namespace internvl::cuda
