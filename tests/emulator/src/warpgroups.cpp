// wgmma from its issue to its delivery, and setmaxnreg.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "wgmma.h"

namespace internvl::emulator {
namespace {

constexpr uint32_t kPoisonBits = 0xffffffffu;  // NaN
constexpr uint32_t kAllWarps = 0xfu;

bool same_form(const WgmmaArgs& x, const WgmmaArgs& y) {
  return (x.a == nullptr) == (y.a == nullptr) && x.a_descriptor == y.a_descriptor &&
         x.b_descriptor == y.b_descriptor && x.n == y.n && x.is_bf16 == y.is_bf16 &&
         x.accumulate == y.accumulate && x.a_mn_major == y.a_mn_major &&
         x.b_mn_major == y.b_mn_major;
}

// Accumulator i of a lane: row and column of the [64, n] product.
int fragment_index(uint32_t lane, uint32_t i, int n) {
  const uint32_t row = 16 * (lane / kLanes) + lane % kLanes / 4 + 8 * (i % 4 / 2);
  const uint32_t column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
  return static_cast<int>(row) * n + static_cast<int>(column);
}

RegisterRange* find_range(WarpgroupWarp& me, const void* registers, uint32_t count) {
  for (RegisterRange& range : me.ranges)
    if (range.registers[0] == registers && range.count == count) return &range;
  return nullptr;
}

void hold(RegisterRange& range) {
  for (uint32_t i = 0; i < kLanes; ++i)
    memcpy(&range.held[i * range.count], range.registers[i], 4 * range.count);
}

bool unchanged(const RegisterRange& range) {
  for (uint32_t i = 0; i < kLanes; ++i)
    if (memcmp(&range.held[i * range.count], range.registers[i], 4 * range.count) != 0)
      return false;
  return true;
}

// A range that was not known before is as it is now.
RegisterRange& remember(WarpgroupWarp& me, void* const* args, bool of_a, uint32_t count) {
  const auto registers = [&](uint32_t i) -> const void* {
    const auto& each = *static_cast<const WgmmaArgs*>(args[i]);
    return of_a ? static_cast<const void*>(each.a) : each.d;
  };
  if (RegisterRange* known = find_range(me, registers(0), count)) return *known;
  constexpr size_t kMaxRanges = 256;
  if (me.ranges.size() == kMaxRanges) me.ranges.erase(me.ranges.begin());
  RegisterRange range{{}, count, std::vector<uint32_t>(kLanes * count)};
  for (uint32_t i = 0; i < kLanes; ++i) range.registers[i] = registers(i);
  hold(range);
  me.ranges.push_back(std::move(range));
  return me.ranges.back();
}

}  // namespace

// ---- issue ----

void Block::issue_product(Warp& w) {
  if (w.index / 4 * 4 + 3 >= warps_.size())
    stop("wgmma", w.site, "warp " + std::to_string(w.index) + " is in no whole warpgroup");
  const WgmmaArgs& form = *static_cast<WgmmaArgs*>(w.args[0]);
  for (void* args : w.args)
    if (!same_form(form, *static_cast<WgmmaArgs*>(args)))
      stop("divergence", w.site, "lanes of a warp pass different descriptors to wgmma");
  Warpgroup& group = warpgroup(w);
  WarpgroupWarp& me = warpgroup_warp(w);
  const uint32_t id = ++me.issued;
  if (id > group.records.size()) {
    group.records.push_back({w.site});
    Product product{};
    product.id = id;
    product.site = w.site;
    product.form = form;
    group.products.push_back(std::move(product));
    ++statistics.wgmma;
    statistics.wgmma_products += 1024 * form.n;
    for (const bool is_a : {true, false}) {
      if (is_a && form.a) continue;
      const uint64_t bits = is_a ? form.a_descriptor : form.b_descriptor;
      const MatrixOperand operand(bits, is_a ? form.a_mn_major : form.b_mn_major);
      const std::string error = operand.error(bits, is_a ? 64 : form.n);
      if (!error.empty())
        session->report("descriptor", w.site, (is_a ? "of A: " : "of B: ") + error);
    }
  }
  Product& product = group.products[id - group.products.front().id];
  if (product.site.line != w.site.line || product.site.file != w.site.file ||
      !same_form(product.form, form))
    stop("divergence", w.site,
         "warp " + std::to_string(w.index) + " issues another wgmma than its warpgroup at " +
             text_of(product.site) + ", or with other descriptors");
  check_ordered_registers(w, product);
  take_registers(w, product);
  Clocks scratch;
  const Actor actor = whole_warp(w, scratch);
  if (!form.a) note_operand(w, product, true, actor);
  note_operand(w, product, false, actor);
  product.issued |= static_cast<uint8_t>(1u << w.index % 4);
  if (product.issued != kAllWarps) return;
  for (uint32_t i = w.index / 4 * 4; i < w.index / 4 * 4 + 4; ++i) {
    warps_[i].ready |= warps_[i].waits_for_products;
    warps_[i].waits_for_products = false;
  }
}

// The youngest product after `after` that the warp has issued, not received, and that writes there.
Product* Block::under_way(Warp& w, const float* d, uint32_t after) {
  Warpgroup& group = warpgroup(w);
  const WarpgroupWarp& me = warpgroup_warp(w);
  Product* found = nullptr;
  for (Product& product : group.products)
    if (product.id > std::max(after, me.delivered) && (product.issued >> w.index % 4 & 1u) &&
        product.d[w.index % 4 * kLanes] == d)
      found = &product;
  return found;
}

// What the warp did with the registers itself, a wgmma_fence must have ordered.
void Block::check_ordered_registers(Warp& w, const Product& product) {
  WarpgroupWarp& me = warpgroup_warp(w);
  const auto count = static_cast<uint32_t>(product.form.n / 2);
  const auto& first = *static_cast<WgmmaArgs*>(w.args[0]);
  const auto report = [&](const char* what) {
    session->report("missing fence", w.site,
                    "warp " + std::to_string(w.index) + ": no wgmma_fence after it used " + what);
  };
  if (!under_way(w, first.d, 0)) {
    const RegisterRange* known = find_range(me, first.d, count);
    if (product.form.accumulate && known ? !unchanged(*known) : !me.fenced)
      report("the accumulators");
  }
  if (!first.a) return;
  const RegisterRange* known = find_range(me, first.a, 4);
  if (known ? !unchanged(*known) : !me.fenced) report("the registers of A");
}

// Accumulators are saved and poisoned, registers of A are saved.
void Block::take_registers(Warp& w, Product& product) {
  WarpgroupWarp& me = warpgroup_warp(w);
  const int n = product.form.n;
  const auto count = static_cast<uint32_t>(n / 2);
  const uint32_t first_lane = w.index % 4 * kLanes;
  const float* d = static_cast<WgmmaArgs*>(w.args[0])->d;
  for (const Product& other : warpgroup(w).products) {
    if (!(other.issued >> w.index % 4 & 1u) || other.id <= me.delivered || &other == &product)
      continue;
    const float* begin = other.d[first_lane];
    if (begin < d + count && d < begin + other.form.n / 2 &&
        (begin != d || other.form.n != product.form.n))
      session->report(
          "registers", w.site,
          "accumulators overlap those of the wgmma under way at " + text_of(other.site));
  }
  if (const Product* before = under_way(w, d, 0)) product.follows = before->id;
  remember(me, w.args, false, count);
  if (product.form.a) remember(me, w.args, true, 4);
  product.sums.resize(size_t{64} * n);
  for (uint32_t i = 0; i < kLanes; ++i) {
    const auto& args = *static_cast<WgmmaArgs*>(w.args[i]);
    const uint32_t at = first_lane + i;
    product.d[at] = args.d;
    product.a[at] = args.a;
    if (args.a) memcpy(product.a_values[at], args.a, sizeof product.a_values[at]);
    if (product.form.accumulate && product.follows == 0)
      for (uint32_t r = 0; r < count; ++r) product.sums[fragment_index(at, r, n)] = args.d[r];
    std::fill_n(args.d, count, bits_float(kPoisonBits));
  }
}

// Of A, a warp multiplies its own 16 rows.
void Block::note_operand(Warp& w, const Product& product, bool is_a, const Actor& actor) {
  const WgmmaArgs& form = product.form;
  const bool mn_major = is_a ? form.a_mn_major : form.b_mn_major;
  const MatrixOperand operand(is_a ? form.a_descriptor : form.b_descriptor, mn_major);
  const uint32_t begin = is_a ? 16 * (w.index % 4) : 0;
  const uint32_t end = is_a ? begin + 16 : static_cast<uint32_t>(form.n);
  const uint32_t unit = w.index / 4;
  for (uint32_t major = mn_major ? 0 : begin; major < (mn_major ? 16 : end); ++major)
    for (uint32_t minor = mn_major ? begin / 8 : 0; minor < (mn_major ? end / 8 : 2); ++minor)
      if (!shared_.begin_async_read(operand.chunk(major, minor), actor, unit, product.id, w.site))
        return;
}

void Block::fence_registers(Warp& w) {
  WarpgroupWarp& me = warpgroup_warp(w);
  me.fenced = true;
  for (RegisterRange& range : me.ranges) hold(range);
}

// ---- completion ----

void Block::wait_products(Warp& w) {
  Warpgroup& group = warpgroup(w);
  WarpgroupWarp& me = warpgroup_warp(w);
  const uint32_t pending = static_cast<WgmmaWaitArgs*>(w.args[0])->pending;
  if (me.group_ends.size() <= pending) return;
  const size_t done = me.group_ends.size() - pending;
  const uint32_t target = me.group_ends[done - 1];
  me.group_ends.erase(me.group_ends.begin(), me.group_ends.begin() + done);
  level_clocks(w);
  while (me.delivered < target) {
    const uint32_t id = me.delivered + 1;
    const auto product = [&]() -> Product& {
      return group.products[id - group.products.front().id];
    };
    while (product().issued != kAllWarps) {
      w.waits_for_products = true;
      w.ready = false;
      w.resume = lane_;
      choose_warp();
    }
    if (!product().computed) compute(group, product());
    deliver(w, product());
  }
  while (!group.products.empty() && group.products.front().delivered == kAllWarps) {
    const Product& over = group.products.front();
    for (Product& later : group.products)
      if (later.follows == over.id && !later.computed) later.sums = over.sums;
    group.products.pop_front();
  }
}

// Reads the operands now, the latest moment.
void Block::compute(Warpgroup& group, Product& product) {
  const WgmmaArgs& form = product.form;
  float a[64][16], chunk[8];
  std::vector<float> b(size_t{16} * form.n);
  const auto read = [&](const MatrixOperand& operand, uint32_t extent, const auto& put) {
    const bool mn = operand.mn_major;
    for (uint32_t major = 0; major < (mn ? 16 : extent); ++major) {
      for (uint32_t minor = 0; minor < (mn ? extent / 8 : 2); ++minor) {
        const uint32_t addr = operand.chunk(major, minor);
        if (int64_t{addr} - kSharedBase < 0 ||
            int64_t{addr} + 16 - kSharedBase > config_.shared_bytes)
          continue;  // reported at the issue
        widen_chunk(shared_.bytes(addr), form.is_bf16, chunk);
        for (uint32_t e = 0; e < 8; ++e)
          mn ? put(8 * minor + e, major, chunk[e]) : put(major, 8 * minor + e, chunk[e]);
      }
    }
  };
  if (form.a) {
    for (uint32_t lane = 0; lane < kWarpgroupLanes; ++lane) {
      for (uint32_t r = 0; r < 4; ++r) {
        const uint32_t row = 16 * (lane / kLanes) + lane % kLanes / 4 + 8 * (r % 2);
        const uint32_t k = 2 * (lane % 4) + 8 * (r / 2), pair = product.a_values[lane][r];
        const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
        a[row][k] = form.is_bf16 ? bf16_to_float(low) : fp16_to_float(low);
        a[row][k + 1] = form.is_bf16 ? bf16_to_float(high) : fp16_to_float(high);
      }
    }
  } else {
    read(MatrixOperand(form.a_descriptor, form.a_mn_major), 64,
         [&](uint32_t m, uint32_t k, float value) { a[m][k] = value; });
  }
  read(MatrixOperand(form.b_descriptor, form.b_mn_major), static_cast<uint32_t>(form.n),
       [&](uint32_t n, uint32_t k, float value) { b[size_t{k} * form.n + n] = value; });
  if (product.follows >= group.products.front().id)
    product.sums = group.products[product.follows - group.products.front().id].sums;
  wgmma_m64k16(product.sums.data(), a, b.data(), form.n, form.accumulate, order_);
  product.computed = true;
}

void Block::deliver(Warp& w, Product& product) {
  WarpgroupWarp& me = warpgroup_warp(w);
  const int n = product.form.n;
  const uint32_t first_lane = w.index % 4 * kLanes, count = static_cast<uint32_t>(n / 2);
  const bool last = under_way(w, product.d[first_lane], product.id) == nullptr;
  bool touched_d = false, touched_a = false;
  for (uint32_t i = 0; i < kLanes; ++i) {
    const uint32_t at = first_lane + i;
    if (product.a[at])
      touched_a |= memcmp(product.a[at], product.a_values[at], sizeof product.a_values[at]) != 0;
    for (uint32_t r = 0; r < count && last; ++r)
      touched_d |= float_bits(product.d[at][r]) != kPoisonBits;
  }
  if (touched_a || touched_d)
    session->report("registers", product.site,
                    "warp " + std::to_string(w.index) + ": " +
                        (touched_d ? "accumulators" : "registers of A") +
                        " were changed before the wait at " + text_of(w.site));
  if (last && !touched_d) {
    for (uint32_t i = 0; i < kLanes; ++i)
      for (uint32_t r = 0; r < count; ++r)
        product.d[first_lane + i][r] = product.sums[fragment_index(first_lane + i, r, n)];
    if (RegisterRange* range = find_range(me, product.d[first_lane], count)) hold(*range);
  }
  product.delivered |= static_cast<uint8_t>(1u << w.index % 4);
  ProductRecord& record = warpgroup(w).records[product.id - 1];
  record.delivered = product.delivered;
  record.wait_clock[w.index % 4] = w.clock;
  me.delivered = product.id;
  me.fenced = false;
}

bool Block::read_over(uint32_t unit, uint32_t id, const Actor& actor) const {
  if (unit == kBulkUnit) {
    const BulkRead& read = bulk_reads_[id - 1];
    return read.over && actor.knows(read.thread, read.clock);
  }
  const ProductRecord& record = warpgroups_[unit].records[id - 1];
  for (uint32_t i = 0; i < 4; ++i) {
    if (!(record.delivered >> i & 1u)) continue;
    const uint32_t warp = 4 * unit + i;
    if (actor.warp == warp || actor.known->knows_any_of(warp, record.wait_clock[i])) return true;
  }
  return false;
}

std::string Block::read_text(uint32_t unit, uint32_t id) const {
  if (unit == kBulkUnit) return "the bulk store issued at " + text_of(bulk_reads_[id - 1].site);
  return "the wgmma of warpgroup " + std::to_string(unit) + " issued at " +
         text_of(warpgroups_[unit].records[id - 1].site);
}

// ---- registers ----

void Block::set_max_registers(Warp& w) {
  const auto& args = *static_cast<RegisterArgs*>(w.args[0]);
  Warpgroup& group = warpgroup(w);
  const auto bit = static_cast<uint8_t>(1u << w.index % 4);
  if (group.resizing == 0) {
    group.resize = args;
    group.resize_site = w.site;
  } else if ((group.resizing & bit) || group.resize.count != args.count ||
             group.resize.increase != args.increase) {
    stop("registers", w.site,
         "the warps of a warpgroup execute different setmaxnreg; another one is at " +
             text_of(group.resize_site));
  }
  group.resizing |= bit;
  if (group.resizing != kAllWarps) return;
  group.resizing = 0;
  const uint32_t before = group.registers;
  const auto after = static_cast<uint32_t>(args.count);
  if (args.increase ? after < before : after > before)
    session->report("registers", w.site,
                    "setmaxnreg." + std::string(args.increase ? "inc" : "dec") + " from " +
                        std::to_string(before) + " to " + std::to_string(after));
  group.registers = after;
}

void Block::report_registers() {
  uint32_t sum = 0;
  Site site{};
  for (const Warpgroup& group : warpgroups_) {
    sum += kWarpgroupLanes * group.registers;
    if (!group.resize_site.file) continue;
    site = group.resize_site;
    if (group.resizing != 0)
      session->report("registers", site, "only some warps of a warpgroup execute this setmaxnreg");
  }
  const uint32_t given = kWarpgroupLanes * registers_at_launch(config_.threads) *
                         static_cast<uint32_t>(warpgroups_.size());
  if (site.file && sum > given)
    session->report("registers", site,
                    "the warpgroups want " + std::to_string(sum) + " registers; the block has " +
                        std::to_string(given) + " from its launch");
}

}  // namespace internvl::emulator
