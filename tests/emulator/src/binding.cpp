// The Python module _emulator: one session at a time; launches go through the host functions of the
// kernels, as they do from csrc/cuda/*.cpp.
#include "binding.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block.h"

namespace py = pybind11;

namespace internvl::emulator {
namespace {

Session the_session;

void start(uint64_t seed, uint64_t sum_order, const std::string& skip, bool bank_conflicts,
           bool toward_zero) {
  the_session = Session{};
  the_session.options = {seed, sum_order, skip, bank_conflicts, toward_zero};
  global_memory.clear();
  session = &the_session;
}

void add(const std::string& name, uintptr_t base, size_t bytes, bool writable,
         const py::object& known) {
  std::vector<uint8_t> bytes_known;
  if (!known.is_none()) {
    const auto text = known.cast<std::string>();
    bytes_known.assign(text.begin(), text.end());
    if (bytes_known.size() != bytes) throw py::value_error("known: one byte per byte of memory");
  }
  global_memory.add(name, reinterpret_cast<void*>(base), bytes, writable, std::move(bytes_known));
}

py::list reports() {
  py::list result;
  for (const auto& [key, report] : the_session.reports)
    result.append(py::make_tuple(report.kind, report.text, report.count));
  return result;
}

py::dict statistics_dict(const Statistics& s) {
  py::dict d;
  d["blocks"] = s.blocks;
  d["mma"] = s.mma;
  d["ldmatrix"] = s.ldmatrix;
  d["ldmatrix_wavefronts"] = s.ldmatrix_wavefronts;
  d["shuffles"] = s.shuffles;
  d["votes"] = s.votes;
  d["warp_barriers"] = s.warp_barriers;
  d["block_barriers"] = s.block_barriers;
  d["math"] = s.math;
  d["atomics"] = s.atomics;
  d["cp_async"] = s.cp_async;
  d["cp_async_bytes"] = s.cp_async_bytes;
  d["ld_shared"] = s.ld_shared;
  d["st_shared"] = s.st_shared;
  d["ld_global"] = s.ld_global;
  d["st_global"] = s.st_global;
  d["ld_global_bytes"] = s.ld_global_bytes;
  d["st_global_bytes"] = s.st_global_bytes;
  d["wgmma"] = s.wgmma;
  d["wgmma_products"] = s.wgmma_products;
  d["bulk_loads"] = s.bulk_loads;
  d["bulk_load_bytes"] = s.bulk_load_bytes;
  d["bulk_stores"] = s.bulk_stores;
  d["bulk_store_bytes"] = s.bulk_store_bytes;
  d["mbarrier_arrivals"] = s.mbarrier_arrivals;
  d["mbarrier_waits"] = s.mbarrier_waits;
  d["proxy_fences"] = s.proxy_fences;
  return d;
}

// Per kernel: launches, instruction counts, the table of accesses, and its barriers and waits.
py::dict kernels() {
  py::dict result;
  for (const auto& [name, run] : the_session.kernels) {
    py::dict entry = statistics_dict(run.statistics);
    entry["launches"] = run.launches;
    entry["threads"] = run.threads;
    entry["shared_bytes"] = run.shared_bytes;
    py::dict accesses;
    for (const auto& [site, at] : run.accesses)
      accesses[py::str(site)] = py::make_tuple(at.requests, at.parts, at.ideal);
    entry["accesses"] = accesses;
    py::dict synchronising;
    for (const auto& [site, kind] : run.synchronising) synchronising[py::str(site)] = kind;
    entry["synchronising"] = synchronising;
    result[py::str(name)] = entry;
  }
  return result;
}

}  // namespace
}  // namespace internvl::emulator

PYBIND11_MODULE(_emulator, m) {
  using namespace internvl::emulator;
  m.doc() = "The CUDA kernels of this package on the CPU, instruction by instruction";
  m.def("start", &start, py::kw_only(), py::arg("seed") = 0, py::arg("sum_order") = 0,
        py::arg("skip") = "", py::arg("bank_conflicts") = false, py::arg("toward_zero") = false,
        "Begin a session: forget memory, reports and statistics.");
  m.def("add", &add, py::arg("name"), py::arg("base"), py::arg("bytes"), py::arg("writable"),
        py::arg("known") = py::none(),
        "Memory that kernels may touch. known: which bytes hold values; None: all.");
  m.def("unwritten", [](const std::string& name) { return global_memory.unwritten(name); });
  m.def("reports", &reports, "What was wrong so far: (kind, text, occurrences).");
  m.def("kernels", &kernels, "Per kernel: instruction counts, accesses, barriers and waits.");
  bind_selftest(m);
  bind_clip_qk_layernorm(m);
  bind_prefix_attn_fwd(m);
  bind_prefix_attn_bwd(m);
}
