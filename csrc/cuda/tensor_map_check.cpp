// What a tensor map can describe: the rules of cuTensorMapEncodeTiled, in words. No CUDA header.
#include "cuda/ptx/tensor_map.h"

namespace internvl::ptx {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 32;
constexpr int64_t kMaxStride = int64_t{1} << 40;
constexpr int kMaxBox = 256;

std::string of_dimension(const char* what, int dimension, int64_t value) {
  return std::string(what) + " of dimension " + std::to_string(dimension) + " is " +
         std::to_string(value);
}

std::string dimension_error(const TensorMapShape& shape, int i) {
  const int64_t size = shape.sizes[i];
  if (size < 1 || size > kMaxSize)
    return of_dimension("the size", i, size) + "; allowed: 1 to 2^32";
  if (shape.box[i] < 1 || shape.box[i] > kMaxBox)
    return of_dimension("the box", i, shape.box[i]) + "; allowed: 1 to 256";
  if (i == 0 || size == 1) return {};
  const int64_t stride = shape.byte_strides[i - 1];
  if (stride <= 0 || stride >= kMaxStride || stride % 16 != 0)
    return of_dimension("the byte stride", i, stride) +
           "; allowed: positive multiples of 16 below 2^40";
  const int64_t row_bytes = shape.sizes[0] * element_bytes(shape.type);
  if (stride < row_bytes)
    return of_dimension("the byte stride", i, stride) + ": rows of " + std::to_string(row_bytes) +
           " bytes overlap";
  return {};
}

}  // namespace

std::string tensor_map_error(const void* base, const TensorMapShape& shape) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0)
    return "the tensor begins at an address that is not a multiple of 16";
  if (shape.rank < 3 || shape.rank > kMaxTensorMapRank)
    return "the rank is " + std::to_string(shape.rank) + "; allowed: 3 to 5";
  for (int i = 0; i < shape.rank; ++i) {
    const std::string error = dimension_error(shape, i);
    if (!error.empty()) return error;
  }
  const int row_bytes = shape.box[0] * element_bytes(shape.type);
  const int span = static_cast<int>(shape.swizzle);
  if (span != 0 && row_bytes != span)
    return "a row of the box has " + std::to_string(row_bytes) + " bytes; allowed: the " +
           std::to_string(span) + " that the swizzle spans";
  if (row_bytes % 16 != 0)
    return "a row of the box has " + std::to_string(row_bytes) + " bytes; allowed: multiples of 16";
  return {};
}

}  // namespace internvl::ptx
