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

inline PrefixAttnParams attn_params_of(const Arguments& at) {
  PrefixAttnParams params;
  params.dtype = at.dtype("dtype");
  params.batch = at.integer("batch");
  params.seqlen_q = at.integer("seqlen_q");
  params.seqlen_k = at.integer("seqlen_k");
  params.heads_q = at.integer("heads_q");
  params.heads_kv = at.integer("heads_kv");
  params.head_dim = at.integer("head_dim");
  params.softmax_scale = at.number("softmax_scale");
  params.window = at.integer("window");
  params.alibi_prune = at.integer("alibi_prune") != 0;
  params.q = at.view("q");
  params.k = at.view("k");
  params.v = at.view("v");
  params.out = at.view("out");
  params.lse = at.pointer<float>("lse");
  params.prefix_len = at.pointer<int32_t>("prefix_len");
  params.key_range = at.pointer<int32_t>("key_range");
  params.query_start = at.pointer<int32_t>("query_start");
  params.key_flags = at.pointer<uint8_t>("key_flags");
  params.segment_ids = at.pointer<int32_t>("segment_ids");
  params.alibi_slopes = at.pointer<float>("alibi_slopes");
  return params;
}

}  // namespace internvl::emulator
