// Compiled, never launched: instantiates every function of the mask and pruning headers for the
// device, so that the headers stay usable in kernels. Their meaning is compared with the
// specification on the host (tests/test_semantics.py, tests/test_prune.py).
#include "common/mask.h"
#include "common/prune.h"

namespace internvl::mask_check {

// One answer per position j. tile = {p_lo, p_hi, j_lo, j_hi, q_lo, q_hi, k_lo, k_hi}.
template <class I>
__global__ void mask_check_kernel(const uint8_t* flags, const int64_t* tile, int64_t query_start,
                                  I prefix_len, I start, I end, I window, float slope, int* classes,
                                  bool* seen, float* bias) {
  const I j = static_cast<I>(threadIdx.x);
  const int64_t p = clamp_position(query_position(query_start, blockIdx.x), end, window);
  const bool valid = valid_in_range(j, start, end) & flag_valid(flags[j]);
  const bool bidirectional = bidirectional_in_prefix(j, prefix_len) | flag_bidirectional(flags[j]);
  seen[j] = visible(valid, true, bidirectional, causal(static_cast<I>(p), j, window));
  bias[j] = alibi_bias(slope, p, j);

  const KeyTileSummary keys;
  const TileClass by_range =
      classify_tile(tile[0], tile[1], tile[2], tile[3], prefix_len, start, end, window);
  const TileClass by_flags =
      classify_tile_flags(tile[0], tile[1], tile[2], tile[3], keys.any_valid, keys.all_valid,
                          keys.any_bidirectional, keys.all_bidirectional, window);
  const TileClass by_segments = classify_tile_segments(tile[4], tile[5], tile[6], tile[7]);
  classes[j] = combine_classes(combine_classes(by_range, by_flags), by_segments);
}

__global__ void prune_check_kernel(DType dtype, const int64_t* tile, const float* squares,
                                   float slope, float scale, float lower, bool* skipped) {
  const float norm = prune_norm(squares[threadIdx.x]);
  const float cutoff =
      prune_cutoff(slope, scale, norm, norm, lower, prune_threshold(dtype, tile[3]));
  skipped[threadIdx.x] = prune_tile(cutoff, tile_distance(tile[0], tile[1], tile[2], tile[3]));
}

template __global__ void mask_check_kernel<int32_t>(const uint8_t*, const int64_t*, int64_t,
                                                    int32_t, int32_t, int32_t, int32_t, float, int*,
                                                    bool*, float*);
template __global__ void mask_check_kernel<int64_t>(const uint8_t*, const int64_t*, int64_t,
                                                    int64_t, int64_t, int64_t, int64_t, float, int*,
                                                    bool*, float*);

}  // namespace internvl::mask_check
