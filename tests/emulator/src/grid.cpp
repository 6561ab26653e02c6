// Runs the blocks of a grid one after another in a seeded order.
#include <algorithm>
#include <numeric>

#include "block.h"

namespace internvl::emulator {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

MmaOrder mma_order(const Options& options) {
  MmaOrder order{};
  std::iota(order.permutation, order.permutation + 16, 0);
  Random random(options.sum_order);
  for (uint32_t i = 15; i > 0 && options.sum_order != 0; --i)
    std::swap(order.permutation[i], order.permutation[random.below(i + 1)]);
  order.addend_last = options.sum_order % 2 != 0;
  order.toward_zero = options.toward_zero;
  return order;
}

void add(Statistics& sum, const Statistics& part) {
  auto* to = reinterpret_cast<int64_t*>(&sum);
  const auto* from = reinterpret_cast<const int64_t*>(&part);
  for (size_t i = 0; i < sizeof(Statistics) / sizeof(int64_t); ++i) to[i] += from[i];
}

}  // namespace

std::string run_grid(const GridConfig& config, const std::function<void()>& kernel) {
  if (!session) return "launched outside of an emulator session";
  if (session->over) return {};
  if (config.threads < 32 || config.threads > kMaxThreads || config.threads % 32 != 0)
    return std::to_string(config.threads) + " threads; the emulator runs whole warps up to 1024";
  if (config.shared_bytes < 0 || config.shared_bytes > kMaxSharedBytes)
    return std::to_string(config.shared_bytes) + " bytes of shared memory; at most 232448 fit";
  const Index3& grid = config.grid;
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    return "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
           std::to_string(grid.z) + " blocks; at most 2147483647 x 65535 x 65535 are launched";
  KernelRun& run = session->kernels[config.name];
  run.name = config.name;
  ++run.launches;
  run.threads = config.threads;
  run.shared_bytes = config.shared_bytes;
  global_memory.begin_launch();
  const MmaOrder order = mma_order(session->options);
  Block block(config, kernel, run, order);
  gridDim = config.grid;
  blockDim = {static_cast<unsigned>(config.threads), 1, 1};
  const uint64_t blocks = uint64_t{config.grid.x} * config.grid.y * config.grid.z;
  std::vector<uint32_t> indices(blocks);
  std::iota(indices.begin(), indices.end(), 0);
  Random random(session->options.seed);
  for (uint32_t i = static_cast<uint32_t>(blocks); i > 1 && session->options.seed != 0; --i)
    std::swap(indices[i - 1], indices[random.below(i)]);
  for (uint32_t index : indices) {
    blockIdx = {index % config.grid.x, index / config.grid.x % config.grid.y,
                index / (config.grid.x * config.grid.y)};
    if (!block.execute(index, session->options.seed * 1000003)) break;
  }
  block.statistics.blocks = static_cast<int64_t>(blocks);
  add(run.statistics, block.statistics);
  return {};
}

}  // namespace internvl::emulator
