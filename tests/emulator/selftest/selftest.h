// Launches of the small kernels; addresses of global memory as numbers. Each returns the error of
// its launch, empty when it ran.
#pragma once

#include <cstdint>
#include <string>

namespace internvl::selftest {

std::string run_mma(bool is_bf16, uint64_t a, uint64_t b, uint64_t c, uint64_t d);
std::string run_ldmatrix(uint64_t image, int bytes, uint64_t rows, uint64_t out, int matrices,
                         bool transposed);
std::string run_exchange(uint64_t in, uint64_t out);
std::string run_math(uint64_t x, uint64_t y, int n, int function);
std::string run_copy(int bytes, uint64_t src, uint64_t dst);

// A kernel of protocols.cpp or mistakes.cpp by name: in [256] and out [256] floats.
std::string run_named(const std::string& name, uint64_t in, uint64_t out, uint64_t counter);

}  // namespace internvl::selftest
