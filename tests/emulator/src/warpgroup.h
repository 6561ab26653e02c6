// The asynchronous products of one warpgroup, and its registers.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "clocks.h"
#include "emulator/machine.h"

namespace internvl::emulator {

constexpr uint32_t kWarpgroupLanes = 4 * kLanes;

// Per thread, with one block to a multiprocessor.
constexpr uint32_t registers_at_launch(int threads) {
  const int even_share = 65536 / threads / 8 * 8;
  return static_cast<uint32_t>(even_share < 255 ? even_share : 248);
}

// One wgmma from its issue by the first warp to its last delivery.
struct Product {
  uint32_t id;  // 1, 2, ...: within the warpgroup
  Site site;
  WgmmaArgs form;         // what all lanes pass alike; d and a are below
  uint8_t issued = 0;     // warps, one bit each
  uint8_t delivered = 0;  // warps that have waited for it
  bool computed = false;
  uint32_t follows = 0;  // the product that accumulates there, under way at this one's issue
  float* d[kWarpgroupLanes];
  const uint32_t* a[kWarpgroupLanes];
  uint32_t a_values[kWarpgroupLanes][4];
  std::vector<float> sums;  // [64][n]: before, then after
};

// What is kept of it: later writers of its operands ask.
struct ProductRecord {
  Site site{};
  uint8_t delivered = 0;
  uint32_t wait_clock[4] = {};  // of the warps when they waited
};

// Registers that wgmma uses, and what they held when the warp last ordered its own use of them.
struct RegisterRange {
  const void* registers[kLanes];
  uint32_t count;  // 4-byte registers of each lane
  std::vector<uint32_t> held;
};

struct WarpgroupWarp {
  uint32_t issued = 0, delivered = 0;  // products
  std::vector<uint32_t> group_ends;    // number of products issued at each commit
  bool fenced = false;                 // since the last wait that delivered something
  std::vector<RegisterRange> ranges;
};

struct Warpgroup {
  std::deque<Product> products;        // under way
  std::vector<ProductRecord> records;  // of all, by id - 1
  WarpgroupWarp warps[4];
  // setmaxnreg: warps that have executed the current one, and what it says.
  uint8_t resizing = 0;
  RegisterArgs resize{};
  Site resize_site{};
  uint32_t registers = 0;  // per thread
};

}  // namespace internvl::emulator
