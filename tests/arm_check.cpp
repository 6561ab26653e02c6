// The portable kernels without PyTorch: prefix attention with ALiBi against a double-precision
// loop. Compiled for another processor and run under an emulator by tests/test_arm.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/key_tiles.h"

using namespace internvl;
using namespace internvl::cpu;

namespace {

constexpr int64_t kSeqlen = 300, kHeads = 2, kDim = 24, kPrefix = 40;
const float kSlopes[kHeads] = {0.0f, 1.0f};  // the second head skips tiles

struct Call {
  std::vector<float> q, k, v, out, lse;
  int32_t prefix_len = kPrefix;
  PrefixAttnParams params;

  Call() : out(kSeqlen * kHeads * kDim), lse(kSeqlen * kHeads) {
    unsigned state = 1;
    for (std::vector<float>* x : {&q, &k, &v}) {
      x->resize(kSeqlen * kHeads * kDim);
      for (float& value : *x) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
      }
    }
    const auto view = [](std::vector<float>& x) {
      return View{x.data(), kSeqlen * kHeads * kDim, kHeads * kDim, kDim};
    };
    params.batch = 1;
    params.seqlen_q = params.seqlen_k = kSeqlen;
    params.heads_q = params.heads_kv = kHeads;
    params.head_dim = kDim;
    params.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    params.q = view(q), params.k = view(k), params.v = view(v), params.out = view(out);
    params.lse = lse.data();
    params.prefix_len = &prefix_len;
    params.alibi_slopes = kSlopes;
    params.alibi_prune = true;
  }
};

void run(const Kernels& isa, const PrefixAttnParams& params) {
  FwdPlan plan;
  plan.params = params;
  plan.block_m = 48;
  plan.padded_dim = round_up(kDim, isa.lanes);
  plan.prune_threshold = prune_threshold(params.dtype, kSeqlen) * 1.442695f;
  KeyTileData data;
  plan.keys = data.build(params, kMaxBlockN);
  std::vector<float> scratch(plan.scratch_floats() + 16);
  float* aligned =
      reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
  for (int64_t head = 0; head < kHeads; ++head)
    for (int64_t row0 = 0; row0 < kSeqlen; row0 += plan.block_m) {
      RowTask task{};
      task.head_kv = head;
      task.heads = 1;
      task.row0 = row0;
      task.rows = smaller(plan.block_m, kSeqlen - row0);
      task.tile_end = plan.keys.count;
      isa.fwd_row_tile[0](plan, task, aligned);
    }
}

double worst_error(const Call& call) {
  double worst = 0.0;
  for (int64_t h = 0; h < kHeads; ++h)
    for (int64_t i = 0; i < kSeqlen; ++i) {
      std::vector<double> sums(kDim);
      double total = 0.0;
      for (int64_t j = 0; j < kSeqlen; ++j) {
        if (j > i && j >= kPrefix) continue;
        double score = 0.0;
        for (int64_t d = 0; d < kDim; ++d)
          score +=
              double{call.q[(i * kHeads + h) * kDim + d]} * call.k[(j * kHeads + h) * kDim + d];
        const double weight =
            std::exp(score * call.params.softmax_scale - kSlopes[h] * std::abs(double(i - j)));
        total += weight;
        for (int64_t d = 0; d < kDim; ++d) sums[d] += weight * call.v[(j * kHeads + h) * kDim + d];
      }
      worst = std::fmax(worst, std::fabs(call.lse[h * kSeqlen + i] - std::log(total)));
      for (int64_t d = 0; d < kDim; ++d)
        worst =
            std::fmax(worst, std::fabs(call.out[(i * kHeads + h) * kDim + d] - sums[d] / total));
    }
  return worst;
}

}  // namespace

int main() {
  Call call;
  run(kBaselineKernels, call.params);
  const double worst = worst_error(call);
  std::printf("worst error %.3g\n", worst);
  return worst < 5e-6 ? 0 : 1;
}
