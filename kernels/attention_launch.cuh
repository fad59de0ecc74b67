// From run-time shapes to kernels.
#pragma once
#include <type_traits>

#include "kernels/attention_sight.cuh"
#include "kernels/launch.cuh"
#include "kernels/tensor_tiles.cuh"

namespace kv::blocks {

/// Of the present device.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  KV_CUDA_TRY(cudaGetDevice(&device));
  KV_CUDA_TRY(cudaDeviceGetAttribute(&value, which, device));
  return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline bool has_shared(int bytes) { return bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

inline int tiles_of(int count, int tile) { return (count + tile - 1) / tile; }

inline bool fits_tensor_cores(const AttentionShape& shape, int dim) {
  return shape.elements != Dtype::float32 && dim % 8 == 0 && dim <= 256;
}

/// Calls f(element) for 16-bit elements.
template <class F>
void with_element(const AttentionShape& shape, F f) {
  shape.elements == Dtype::bfloat16 ? f(__nv_bfloat16{}) : f(__half{});
}

/// Calls f(integral_constant<int, padded dim>).
template <class F>
void with_padded_dim(int dim, F f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  if (dim <= 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 256>{});
}

/// Calls f(element, integral_constant<int, padded dim>).
template <class F>
void with_tensor_shape(const AttentionShape& shape, int dim, F f) {
  with_element(shape, [&](auto element) { with_padded_dim(dim, [&](auto padded) { f(element, padded); }); });
}

}  // namespace kv::blocks
