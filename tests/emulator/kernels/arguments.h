// Kernel parameters from Python: a dict of numbers, names of dtypes, and addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "common/params.h"
#include "cuda/device_info.h"

namespace internvl::emulator {

namespace py = pybind11;

struct Arguments {
  py::dict dict;

  // Absent and None are the same: not given.
  bool has(const char* name) const { return dict.contains(name) && !dict[name].is_none(); }
  int64_t integer(const char* name) const { return has(name) ? dict[name].cast<int64_t>() : 0; }
  float number(const char* name) const { return has(name) ? dict[name].cast<float>() : 0.0f; }

  template <class T>
  T* pointer(const char* name) const {
    return has(name) ? reinterpret_cast<T*>(dict[name].cast<uintptr_t>()) : nullptr;
  }

  DType dtype(const char* name) const {
    const auto text = dict[name].cast<std::string>();
    if (text == "float32") return DType::kFloat32;
    if (text == "bfloat16") return DType::kBFloat16;
    if (text == "float16") return DType::kFloat16;
    throw py::value_error(text + " is no dtype of the kernels");
  }

  // (address, stride_b, stride_s, stride_h)
  View view(const char* name) const {
    View result;
    if (!has(name)) return result;
    const auto parts = dict[name].cast<py::tuple>();
    result.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
    result.stride_b = parts[1].cast<int64_t>();
    result.stride_s = parts[2].cast<int64_t>();
    result.stride_h = parts[3].cast<int64_t>();
    return result;
  }
};

inline DeviceInfo device_of(const Arguments& at) {
  DeviceInfo device;
  device.multiprocessors = static_cast<int>(at.integer("multiprocessors"));
  device.compute_capability = static_cast<int>(at.integer("compute_capability"));
  device.max_shared_bytes = static_cast<int>(at.integer("max_shared_bytes"));
  return device;
}

}  // namespace internvl::emulator
