// Rows as device memory stores them: 16-bit words or float32, widened when read and rounded when written.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "kernels/row_memory.hpp"

namespace kv {

__host__ __device__ inline float widen(Dtype dtype, std::uint16_t word) {
  return dtype == Dtype::bfloat16 ? std::bit_cast<float>(static_cast<unsigned>(word) << 16)
                                  : __half2float(__ushort_as_half(word));
}

__host__ __device__ inline float load_element(const void* data, Dtype dtype, long i) {
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

/// Whether rows of `dim` elements can be read and written 8 elements at a time.
__device__ inline bool in_eights(Dtype dtype, int dim) { return dtype != Dtype::float32 && dim % 8 == 0; }

/// Elements i .. i + 7 of a 16-bit array, i a multiple of 8.
__device__ inline void load_eight(const void* data, Dtype dtype, long i, float (&x)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(data) + i);
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = widen(dtype, static_cast<std::uint16_t>(word[k / 2] >> k % 2 * 16));
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
  __host__ __device__ float operator[](int c) const { return load_element(data, elements, c); }
  __device__ bool in_eights() const { return kv::in_eights(elements, dim); }
  __device__ void load_eight(int c, float (&x)[8]) const { kv::load_eight(data, elements, c, x); }
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

/// Neighbouring bytes, by all threads.
__device__ inline void copy_bytes(void* to, const void* from, long bytes) {
  if (bytes % 16 == 0 && reinterpret_cast<std::size_t>(to) % 16 == 0 && reinterpret_cast<std::size_t>(from) % 16 == 0)
    for (long i = threadIdx.x; i < bytes / 16; i += team_threads)
      static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
  else
    for (long i = threadIdx.x; i < bytes / 2; i += team_threads)
      static_cast<std::uint16_t*>(to)[i] = static_cast<const std::uint16_t*>(from)[i];
}

/// Rows from[0 .. count) of an array go to rows to[0 .. count), which are others; by all threads.
__device__ inline void move_rows(void* rows, int row_bytes, int count, const int* from, const int* to) {
  const auto move = [&]<class Word>(Word) {
    const int words = row_bytes / static_cast<int>(sizeof(Word));
    Word* const all = static_cast<Word*>(rows);
    const auto word_of = [&](const int* row, int i) -> Word& {
      return all[static_cast<long>(row[i / words]) * words + i % words];
    };
    constexpr int ahead = 4;
    int i = static_cast<int>(threadIdx.x);
    for (; i + (ahead - 1) * team_threads < count * words; i += ahead * team_threads) {
      Word word[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) word[k] = word_of(from, i + k * team_threads);
#pragma unroll
      for (int k = 0; k < ahead; ++k) word_of(to, i + k * team_threads) = word[k];
    }
    for (; i < count * words; i += team_threads) word_of(to, i) = word_of(from, i);
  };
  row_bytes % 16 == 0 ? move(uint4{}) : move(std::uint16_t{});
}

}  // namespace kv
