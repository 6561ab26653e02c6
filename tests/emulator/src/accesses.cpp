// How the accesses of a warp fall on the 32 banks of shared memory and the 32-byte sectors of
// global memory. Loads and stores are no collectives: the n-th access of each lane from the same
// line since the last collective is taken for one instruction.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "block.h"

namespace internvl::emulator {
namespace {

struct Request {
  const char* kind;
  std::vector<std::pair<uint64_t, uint32_t>> lanes;  // address, bytes
};

// 16-byte accesses go in four parts, 8-byte ones in two; in each part every bank serves one word.
void count_shared(const Request& request, SiteAccesses& at) {
  const uint32_t bytes = request.lanes[0].second;
  const size_t per_part = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  for (size_t begin = 0; begin < request.lanes.size(); begin += per_part) {
    std::set<uint64_t> words[32];
    const size_t end = std::min(begin + per_part, request.lanes.size());
    for (size_t i = begin; i < end; ++i)
      for (uint64_t word = request.lanes[i].first / 4;
           word <= (request.lanes[i].first + bytes - 1) / 4; ++word)
        words[word % 32].insert(word);
    size_t worst = 1;
    for (const auto& bank : words) worst = std::max(worst, bank.size());
    at.parts += static_cast<int64_t>(worst);
    ++at.ideal;
  }
}

void count_global(const Request& request, SiteAccesses& at) {
  std::set<uint64_t> sectors, bytes;
  for (const auto& [addr, size] : request.lanes) {
    for (uint64_t sector = addr / 32; sector <= (addr + size - 1) / 32; ++sector)
      sectors.insert(sector);
    for (uint32_t byte = 0; byte < size; ++byte) bytes.insert(addr + byte);
  }
  at.parts += static_cast<int64_t>(sectors.size());
  at.ideal += static_cast<int64_t>((bytes.size() + 31) / 32);
}

}  // namespace

void Block::log_access(const char* kind, uint64_t addr, uint32_t bytes, Site site) {
  if (session->options.bank_conflicts) warp().log[lane_id()].push_back({site, kind, addr, bytes});
}

void Block::count_accesses(Warp& w) {
  std::map<std::pair<uint64_t, size_t>, Request> requests;  // (line and kind, how often before)
  for (std::vector<Access>& log : w.log) {
    std::map<uint64_t, size_t> before;
    for (const Access& access : log) {
      const uint64_t key =
          uint64_t{session->site_id(access.site)} << 8 | (access.kind[0] + access.kind[3]) % 251;
      Request& request = requests[{key, before[key]++}];
      request.kind = access.kind;
      request.lanes.emplace_back(access.addr, access.bytes);
    }
    log.clear();
  }
  for (const auto& [key, request] : requests) {
    const auto site = static_cast<uint32_t>(key.first >> 8);
    SiteAccesses& at = run_.accesses[session->site_text(site) + " " + request.kind];
    at.kind = request.kind;
    ++at.requests;
    if (strstr(request.kind, "global"))
      count_global(request, at);
    else
      count_shared(request, at);
  }
}

}  // namespace internvl::emulator
