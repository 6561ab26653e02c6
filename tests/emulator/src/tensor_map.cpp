#include "tensor_map.h"

#include <cstring>

namespace internvl {
namespace {

constexpr uint64_t kMagic = 0x70616d20726f736eull;

}  // namespace

namespace emulator {

const TensorMapDescription* description_of(const void* map) {
  const auto* description = static_cast<const TensorMapDescription*>(map);
  return description->magic == kMagic ? description : nullptr;
}

}  // namespace emulator

namespace ptx {

LaunchStatus encode_tensor_map(const void* base, const TensorMapShape& shape, TensorMap* map) {
  const std::string unfit = tensor_map_error(base, shape);
  if (!unfit.empty()) return {"tensor map: " + unfit};
  emulator::TensorMapDescription description{};
  description.magic = kMagic;
  description.base = static_cast<uint8_t*>(const_cast<void*>(base));
  description.rank = static_cast<uint8_t>(shape.rank);
  description.type = static_cast<uint8_t>(shape.type);
  description.element_bytes = static_cast<uint8_t>(element_bytes(shape.type));
  description.swizzle = static_cast<uint8_t>(shape.swizzle);
  for (int i = 0; i < kMaxTensorMapRank; ++i) {
    const bool used = i < shape.rank;
    description.sizes[i] = used ? static_cast<uint32_t>(shape.sizes[i]) : 1;
    description.box[i] = static_cast<uint16_t>(used ? shape.box[i] : 1);
    description.byte_strides[i] = !used    ? 0
                                  : i == 0 ? description.element_bytes
                                           : shape.byte_strides[i - 1];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &description, sizeof description);
  return {};
}

}  // namespace ptx
}  // namespace internvl
