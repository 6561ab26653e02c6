// Kernels that run_named finds. All have the signature (in [256] floats, out [256] floats, counter
// [1]) and, unless they say otherwise, 64 threads.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#define KERNEL_ARGUMENTS \
  [[maybe_unused]] const float *in, [[maybe_unused]] float *out, [[maybe_unused]] uint32_t *counter

namespace internvl::selftest {

using NamedKernels = std::map<std::string, void (*)(const float*, float*, uint32_t*)>;

const NamedKernels& mistakes();  // mistakes.cpp

}  // namespace internvl::selftest
