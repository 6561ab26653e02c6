// Launches of the small kernels; addresses of global memory as numbers. Each returns the error of
// its launch, empty when it ran.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace internvl::selftest {

std::string run_mma(bool is_bf16, uint64_t a, uint64_t b, uint64_t c, uint64_t d);
std::string run_ldmatrix(uint64_t image, int bytes, uint64_t rows, uint64_t out, int matrices,
                         bool transposed);
std::string run_exchange(uint64_t in, uint64_t out);
std::string run_math(uint64_t x, uint64_t y, int n, int function);
std::string run_copy(int bytes, uint64_t src, uint64_t dst);

// A kernel of protocols.cpp or mistakes.cpp by name: in [256] and out [256] floats.
std::string run_named(const std::string& name, uint64_t in, uint64_t out, uint64_t counter);

// ---- Hopper ----

struct WgmmaForm {
  bool is_bf16;
  int n;
  bool a_mn, b_mn, accumulate;
  uint64_t a, b;  // descriptors
};

// image: bytes of shared memory; a_registers [128][4] or 0; d [128][n / 2] floats, in and out.
std::string run_wgmma(const WgmmaForm& form, uint64_t image, int image_bytes, uint64_t a_registers,
                      uint64_t d);

struct BoxForm {
  int type;  // 0: bf16, 1: fp16, 2: fp32
  std::vector<int64_t> sizes, byte_strides;
  std::vector<int> box, at;
  int swizzle;  // bytes
  int store;    // 0: load, 1: store, 2: add
};

// A box of the tensor at `base` to an image of shared memory, or from there.
std::string run_copy_box(const BoxForm& form, uint64_t base, uint64_t image, int image_bytes);
std::string run_copy_row(uint64_t src, uint64_t dst);

// tile::PanelTile of [64, columns] at address 1024: byte offsets of all elements, descriptors of
// all slices.
struct PanelTileTable {
  uint32_t bytes;
  std::vector<uint32_t> offsets;
  std::vector<uint64_t> k_major, mn_major;
};
PanelTileTable panel_tile(int columns);

// A kernel of hopper_protocols.cpp by name: out [64, 64] = a [64, 256] * b [64, 256]^T, all bf16.
std::string run_hopper(const std::string& name, uint64_t a, uint64_t b, uint64_t out);
std::vector<std::string> hopper_names();

}  // namespace internvl::selftest
