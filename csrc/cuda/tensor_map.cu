// Encodes tensor maps by the driver's own function, looked up at run time: the library has to load
// where there is no driver.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/ptx/tensor_map.h"

namespace internvl::ptx {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "a tensor map has 128 bytes");

using Encode = decltype(&cuTensorMapEncodeTiled);
constexpr unsigned kEncodeSince = 12000;  // CUDA version of the function's signature

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, kEncodeSince, cudaEnableDefault, &found);
  if (error != cudaSuccess) cudaGetLastError();  // must not appear as the error of a later launch
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

CUtensorMapDataType data_type(TensorMapType type) {
  switch (type) {
    case TensorMapType::kBf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case TensorMapType::kFp16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case TensorMapType::kFp32:
      break;
  }
  return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

CUtensorMapSwizzle swizzle_mode(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::kNone:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k128:
      break;
  }
  return CU_TENSOR_MAP_SWIZZLE_128B;
}

}  // namespace

LaunchStatus encode_tensor_map(const void* base, const TensorMapShape& shape, TensorMap* map) {
  const std::string unfit = tensor_map_error(base, shape);
  if (!unfit.empty()) return {"tensor map: " + unfit};
  static const Encode encode = find_encode();
  if (!encode) return {"the CUDA driver has no cuTensorMapEncodeTiled; update the driver"};
  cuuint64_t sizes[kMaxTensorMapRank], strides[kMaxTensorMapRank - 1];
  cuuint32_t box[kMaxTensorMapRank], ones[kMaxTensorMapRank];
  cuuint64_t extent = static_cast<cuuint64_t>(shape.sizes[0]) * element_bytes(shape.type);
  for (int i = 0; i < shape.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(shape.sizes[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    ones[i] = 1;
    if (i == 0) continue;
    // The stride of a dimension of size 1 is never used, but the driver checks it.
    strides[i - 1] = shape.sizes[i] == 1 ? (extent + 15) / 16 * 16
                                         : static_cast<cuuint64_t>(shape.byte_strides[i - 1]);
    extent = strides[i - 1] * sizes[i];
  }
  CUtensorMap encoded;
  const CUresult result = encode(
      &encoded, data_type(shape.type), static_cast<cuuint32_t>(shape.rank), const_cast<void*>(base),
      sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_mode(shape.swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return {"cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(result))};
  memcpy(map, &encoded, sizeof encoded);
  return {};
}

}  // namespace internvl::ptx
