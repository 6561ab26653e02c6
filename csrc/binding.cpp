// internvl_kernels._C: what is not an operator. Build information, instruction sets, and the C++
// mirror of the mask, so that tests, FLOP counters and `env` read the compiled truth. No PyTorch
// here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_config.h"
#include "common/mask.h"
#include "common/params.h"
#include "common/prune.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

using internvl::TileClass;

py::dict build_info() {
  namespace config = internvl::build_config;
  py::dict info;
  info["version"] = config::kVersion;
  info["compiler"] = config::kCompiler;
  info["build_type"] = config::kBuildType;
  info["cpu_isas"] = config::kCpuIsas;
  info["cuda"] = config::kNvcc[0] != '\0';
  info["nvcc"] = config::kNvcc;
  info["cuda_archs"] = config::kCudaArchs;
  py::list head_dims;
  for (int head_dim : config::kHeadDims) head_dims.append(head_dim);
  info["cuda_head_dims"] = head_dims;
  info["max_head_dim"] = internvl::kMaxHeadDim;
  return info;
}

std::vector<py::dict> cpu_isas() {
  std::vector<py::dict> rows;
  for (const internvl::cpu::IsaRow& row : internvl::cpu::kIsaTable) {
    py::dict entry;
    entry["name"] = row.name;
    entry["features"] = row.features;
    entry["lanes"] = row.lanes;
    entry["compiled"] = row.compiled;
    entry["supported"] = row.supported();
    rows.push_back(entry);
  }
  return rows;
}

// visible(b = 0, i, j) as a bool array [seqlen_q, seqlen_k], from mask.h. Empty arrays stand for
// absent flags/segments.
py::array_t<bool> visible_mask(int64_t seqlen_q, int64_t seqlen_k, int64_t query_start,
                               int32_t prefix_len, int32_t start, int32_t end,
                               py::array_t<uint8_t> key_flags, py::array_t<int32_t> segment_ids,
                               int64_t window) {
  py::array_t<bool> result({seqlen_q, seqlen_k});
  auto seen = result.mutable_unchecked<2>();
  for (int64_t i = 0; i < seqlen_q; ++i) {
    const int64_t p = internvl::query_position(query_start, i);
    for (int64_t j = 0; j < seqlen_k; ++j) {
      bool valid, bidirectional, same_segment = true;
      if (key_flags.size() > 0) {
        const int flags = key_flags.at(j);
        valid = internvl::flag_valid(flags);
        bidirectional = internvl::flag_bidirectional(flags);
      } else {
        valid = internvl::valid_in_range(j, int64_t{start}, int64_t{end});
        bidirectional = internvl::bidirectional_in_prefix(j, int64_t{prefix_len});
      }
      if (segment_ids.size() > 0)
        same_segment = p >= 0 && p < seqlen_k && segment_ids.at(p) == segment_ids.at(j);
      seen(i, j) =
          internvl::visible(valid, same_segment, bidirectional, internvl::causal(p, j, window));
    }
  }
  return result;
}

// The classes of every (query tile, key tile) of one batch row in the compact form: [query tiles,
// key tiles].
py::array_t<int> tile_plan(int64_t seqlen_q, int64_t seqlen_k, int64_t block_m, int64_t block_n,
                           int64_t query_start, int64_t prefix_len, int64_t start, int64_t end,
                           int64_t window) {
  if (block_m < 1 || block_n < 1)
    throw py::value_error("tile_plan: block_m and block_n must be at least 1");
  const int64_t rows = (seqlen_q + block_m - 1) / block_m,
                columns = (seqlen_k + block_n - 1) / block_n;
  py::array_t<int> result({rows, columns});
  auto classes = result.mutable_unchecked<2>();
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < columns; ++n) {
      const int64_t p_lo = internvl::query_position(query_start, m * block_m);
      const int64_t p_hi =
          internvl::query_position(query_start, internvl::smaller((m + 1) * block_m, seqlen_q) - 1);
      classes(m, n) = internvl::classify_tile(p_lo, p_hi, n * block_n,
                                              internvl::smaller((n + 1) * block_n, seqlen_k),
                                              prefix_len, start, end, window);
    }
  return result;
}

// prune.h by the names of its functions; dtype: "float32", "bfloat16" or "float16".
void bind_prune(py::module_& m) {
  m.def("prune_threshold", [](const std::string& dtype, int64_t seqlen_k) {
    const bool full = dtype == "float32";
    if (!full && dtype != "bfloat16" && dtype != "float16")
      throw py::value_error("prune_threshold: dtype is '" + dtype +
                            "'; allowed: float32, bfloat16, float16");
    return internvl::prune_threshold(full ? internvl::DType::kFloat32 : internvl::DType::kBFloat16,
                                     seqlen_k);
  });
  m.def("prune_norm", [](float sum_of_squares) { return internvl::prune_norm(sum_of_squares); });
  m.def("prune_cutoff", [](float slope, float softmax_scale, float q_norm, float k_norm,
                           float lower, float threshold) {
    return internvl::prune_cutoff(slope, softmax_scale, q_norm, k_norm, lower, threshold);
  });
  m.def("tile_distance", [](int64_t p_lo, int64_t p_hi, int64_t j_lo, int64_t j_hi) {
    return internvl::tile_distance(p_lo, p_hi, j_lo, j_hi);
  });
  m.def("prune_tile",
        [](float cutoff, int64_t distance) { return internvl::prune_tile(cutoff, distance); });
}

int as_int(TileClass value) { return static_cast<int>(value); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the C++ mirror of semantics.py";
  m.def("build_info", &build_info, "What was compiled, as a dict.");
  m.def("cpu_isas", &cpu_isas,
        "One dict per CPU instruction set, in the order of torch.ops.internvl.cpu_isa().");
  m.def("visible_mask", &visible_mask, py::arg("seqlen_q"), py::arg("seqlen_k"), py::kw_only(),
        py::arg("query_start"), py::arg("prefix_len"), py::arg("start"), py::arg("end"),
        py::arg("key_flags") = py::array_t<uint8_t>(),
        py::arg("segment_ids") = py::array_t<int32_t>(), py::arg("window") = 0,
        "visible(i, j) of one batch row from mask.h, bool [seqlen_q, seqlen_k].");
  m.def("tile_plan", &tile_plan, py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("block_m"),
        py::arg("block_n"), py::kw_only(), py::arg("query_start"), py::arg("prefix_len"),
        py::arg("start"), py::arg("end"), py::arg("window") = 0,
        "Tile classes (0 empty, 1 partial, 2 full) of one batch row in the compact form.");
  m.def("alibi_bias",
        [](float slope, int64_t p, int64_t j) { return internvl::alibi_bias(slope, p, j); });
  m.def("visible_key_end", [](int64_t p_hi, int64_t prefix_len, int64_t end) {
    return internvl::visible_key_end(p_hi, prefix_len, end);
  });
  m.def("causal_key_begin",
        [](int64_t p_lo, int64_t window) { return internvl::causal_key_begin(p_lo, window); });
  bind_prune(m);
  m.def("classify_tile", [](int64_t p_lo, int64_t p_hi, int64_t j_lo, int64_t j_hi,
                            int64_t prefix_len, int64_t start, int64_t end, int64_t window) {
    return as_int(internvl::classify_tile(p_lo, p_hi, j_lo, j_hi, prefix_len, start, end, window));
  });
  m.def("classify_tile_flags", [](int64_t p_lo, int64_t p_hi, int64_t j_lo, int64_t j_hi,
                                  bool any_valid, bool all_valid, bool any_bidirectional,
                                  bool all_bidirectional, int64_t window) {
    return as_int(internvl::classify_tile_flags(p_lo, p_hi, j_lo, j_hi, any_valid, all_valid,
                                                any_bidirectional, all_bidirectional, window));
  });
  m.def("classify_tile_segments", [](int64_t q_lo, int64_t q_hi, int64_t k_lo, int64_t k_hi) {
    return as_int(internvl::classify_tile_segments(q_lo, q_hi, k_lo, k_hi));
  });
  m.def("combine_classes", [](int a, int b) {
    return as_int(internvl::combine_classes(static_cast<TileClass>(a), static_cast<TileClass>(b)));
  });
}
