#include "kernels/tile_map.hpp"

#include "kernels/buffer.hpp"

namespace kv {

TileMap make_tile_map(const void* first, int dim, int rows, std::size_t unit_bytes, std::size_t units, int tile) {
  TileMap tiles{};
  int device = 0, major = 0;
  KV_CUDA_TRY(cudaGetDevice(&device));
  KV_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major < 9) return tiles;
  void* encode = nullptr;  // of the driver, which is not linked
  cudaDriverEntryPointQueryResult found{};
  KV_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) throw CudaError("the driver has no cuTensorMapEncodeTiled: it is too old");
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(units)};
  const cuuint64_t apart[] = {static_cast<cuuint64_t>(dim) * 2, unit_bytes};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(tile), 1}, steps[] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &tiles.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(first), sizes, apart, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw CudaError("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return tiles;
}

}  // namespace kv
