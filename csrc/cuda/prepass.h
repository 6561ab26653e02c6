// What runs before an attention kernel when the call asks for it: summaries of flags and segments,
// key norms for ALiBi distance pruning, aligned copies of tensors whose rows are not. Torch-free.
#pragma once

#include <cstdint>

#include "common/params.h"
#include "cuda/launch_status.h"

namespace internvl::cuda {

// Memory of a call, taken piece by piece; every piece starts at a 256-byte address. With a null
// base it only counts, so that sizes and layout come from the same code.
class Workspace {
 public:
  explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }

  int64_t bytes() const { return bytes_; }
  bool counting() const { return base_ == nullptr; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// Where the prepasses left their results; null what was not needed.
struct Prepass {
  int block_n = 0;  // keys per tile
  int64_t tile_count = 0;
  void* tiles = nullptr;  // tile::KeySummaries
  uint8_t* used = nullptr;
  float* key_norms = nullptr;  // [batch][heads_kv][tile_count], null: no pruning
  float prune_threshold = 0.0f;
};

// Does the call have flags or segments, whose tiles need summaries?
bool needs_key_summary(const PrefixAttnParams& params);

// Can distance pruning leave out tiles of this call?
bool may_prune(const PrefixAttnParams& params, int block_n);

// 16-byte rows: what the kernels read directly.
bool rows_aligned(const View& view, int64_t batch, int64_t seqlen, int64_t heads);

// Replaces `view` by a contiguous copy in the workspace, its rows at 16-byte addresses. (While the
// workspace only counts, nothing is launched, and the view stays.)
LaunchStatus pack_rows(Workspace& workspace, View* view, int64_t batch, int64_t seqlen,
                       int64_t heads, int64_t head_dim, void* stream);

// The same where its rows are not aligned.
LaunchStatus align_rows(Workspace& workspace, View* view, int64_t batch, int64_t seqlen,
                        int64_t heads, int64_t head_dim, void* stream);

// q, k and v.
LaunchStatus align_inputs(Workspace& workspace, PrefixAttnParams* params, void* stream);

// Would the grid of a prepass exceed what a launch takes?
bool too_many_tiles(const PrefixAttnParams& params, int block_n);

// Summaries and, with `prune`, norms for tiles of block_n keys. k must be aligned. KV heads with a
// query head less steep than `least_slope` get infinite norms, and nobody reads their keys.
LaunchStatus run_prepass(Workspace& workspace, const PrefixAttnParams& params, int block_n,
                         bool prune, void* stream, Prepass* result, float least_slope = 0.0f);

// Zeros, for counters: working memory holds anything.
LaunchStatus zero_words(uint32_t* words, int64_t count, void* stream);

}  // namespace internvl::cuda
