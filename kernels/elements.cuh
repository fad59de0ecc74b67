// Rows as device memory stores them: 16-bit words or float32, widened when read and rounded when written.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/row_memory.hpp"

namespace kv {

__device__ inline float widen(Dtype dtype, std::uint16_t word) {
  return dtype == Dtype::bfloat16 ? __uint_as_float(static_cast<unsigned>(word) << 16)
                                  : __half2float(__ushort_as_half(word));
}

__device__ inline float load_element(const void* data, Dtype dtype, long i) {
  return dtype == Dtype::float32 ? static_cast<const float*>(data)[i]
                                 : widen(dtype, static_cast<const std::uint16_t*>(data)[i]);
}

/// Writes a value that `dtype` can store exactly, or rounds it to nearest even.
__device__ inline void store_element(void* data, Dtype dtype, long i, float x) {
  if (dtype == Dtype::float32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<std::uint16_t*>(data)[i] =
        dtype == Dtype::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

/// core/rounding.hpp's round_to.
__device__ inline float round_as(Dtype dtype, float x) {
  return dtype == Dtype::bfloat16  ? __bfloat162float(__float2bfloat16_rn(x))
         : dtype == Dtype::float16 ? __half2float(__float2half_rn(x))
                                   : x;
}

/// One key or value in device memory: policies/views.hpp's Row for hooks on the GPU.
struct DeviceRow {
  const void* data;
  int dim;
  Dtype elements;
  __host__ __device__ float operator[](int c) const {
#if defined(__CUDA_ARCH__)
    return load_element(data, elements, c);
#else
    return static_cast<const float*>(data)[c];  // never: the hooks of this row type run on the device
#endif
  }
  __host__ __device__ static DeviceRow at(const void* rows, Dtype elements, long index, int dim) {
    return {static_cast<const char*>(rows) + index * dim * bytes_of(elements), dim, elements};
  }
};

/// Copies row `from` over row `to`, both of `dim` elements in one array; by `threads` threads of which this is `thread`.
__device__ inline void copy_row(void* rows, Dtype elements, int dim, long to, const void* from_rows, long from,
                                int thread, int threads) {
  const int bytes = dim * bytes_of(elements);
  char* target = static_cast<char*>(rows) + to * bytes;
  const char* source = static_cast<const char*>(from_rows) + from * bytes;
  if (bytes % 16 == 0) {
    for (int i = thread; i < bytes / 16; i += threads)
      reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(source)[i];
  } else {
    for (int i = thread; i < bytes / 2; i += threads)
      reinterpret_cast<std::uint16_t*>(target)[i] = reinterpret_cast<const std::uint16_t*>(source)[i];
  }
}

}  // namespace kv
