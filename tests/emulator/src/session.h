// What outlives a launch: options, reports, statistics, sites, and the global memory.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator/machine.h"

namespace internvl::emulator {

struct Options {
  uint64_t seed = 0;            // order of blocks, warps and lanes
  uint64_t sum_order = 0;       // of the sums inside of an mma; 0: ascending
  std::string skip;             // "file:line" of a barrier or wait that is left out; empty: none
  bool bank_conflicts = false;  // per-site table of shared and global accesses; slower
  bool toward_zero = false;     // mma sums truncate
};

struct Report {
  std::string kind;
  std::string text;  // of the first occurrence
  int64_t count = 0;
};

struct Statistics {
  int64_t blocks = 0, mma = 0, ldmatrix = 0, ldmatrix_wavefronts = 0, shuffles = 0, votes = 0;
  int64_t warp_barriers = 0, block_barriers = 0, math = 0, atomics = 0;
  int64_t cp_async = 0, cp_async_bytes = 0;
  int64_t ld_shared = 0, st_shared = 0, ld_global = 0, st_global = 0;
  int64_t ld_global_bytes = 0, st_global_bytes = 0;
  int64_t wgmma = 0, wgmma_products = 0;  // scalar products, m64nNk16 has 1024 N of them
  int64_t bulk_loads = 0, bulk_load_bytes = 0, bulk_stores = 0, bulk_store_bytes = 0;
  int64_t mbarrier_arrivals = 0, mbarrier_waits = 0, proxy_fences = 0;
};

// One line of kernel source: how its warp-wide accesses fall on the banks or sectors.
struct SiteAccesses {
  std::string kind;
  int64_t requests = 0;  // warp-wide instructions
  int64_t parts = 0;     // wavefronts of shared memory, 32-byte sectors of global memory
  int64_t ideal = 0;     // the fewest that could serve the same bytes
};

struct KernelRun {
  std::string name;
  int64_t launches = 0;
  int threads = 0, shared_bytes = 0;  // of a block, at the last launch
  Statistics statistics;
  std::map<std::string, SiteAccesses> accesses;      // "file:line kind"
  std::map<std::string, std::string> synchronising;  // "file:line" of barriers and waits -> kind
};

class Session {
 public:
  Options options;
  std::map<std::string, Report> reports;  // by kind and site
  std::map<std::string, KernelRun> kernels;
  // A wait is left out, and something has been reported: nobody asks for more. What goes on from
  // there follows from garbage, and might have no end.
  bool over = false;

  uint32_t site_id(Site site) {
    if (site.file != last_file_) find_file(site.file);
    return last_index_ << 16 | static_cast<uint32_t>(site.line);
  }
  std::string site_text(uint32_t id) const;
  bool skips(Site site);
  void report(const std::string& kind, Site site, const std::string& text);

 private:
  void find_file(const char* file);

  std::vector<std::string> files_;
  std::map<const char*, uint32_t> file_index_;
  const char* last_file_ = nullptr;
  uint32_t last_index_ = 0;
};

std::string text_of(Site site);

// The session that launches and accesses belong to; null outside of Machine's calls.
extern Session* session;

}  // namespace internvl::emulator
