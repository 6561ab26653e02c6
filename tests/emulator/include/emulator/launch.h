// Twin of csrc/cuda/ptx/launch.cuh: the grid has run when launch() returns.
#pragma once

#include <tuple>

namespace internvl::ptx {

template <class... Params, class... Args>
LaunchStatus launch(void (*kernel)(Params...), const LaunchConfig& config, const Args&... args) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return {};
  const std::tuple<Params...> params(args...);
  const emulator::GridConfig grid{config.name,
                                  {config.grid.x, config.grid.y, config.grid.z},
                                  config.threads,
                                  config.shared_bytes};
  std::string error = emulator::run_grid(grid, [&] { std::apply(kernel, params); });
  return error.empty() ? LaunchStatus{} : LaunchStatus{std::string(config.name) + ": " + error};
}

}  // namespace internvl::ptx
