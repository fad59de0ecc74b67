// Rows as device memory stores them: 16-bit words or float32, widened when read and rounded when written.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "kernels/row_memory.hpp"
#include "policies/views.hpp"

namespace kv {

__host__ __device__ inline float widen(Dtype dtype, std::uint16_t word) {
  return dtype == Dtype::bfloat16 ? std::bit_cast<float>(static_cast<unsigned>(word) << 16)
                                  : __half2float(__ushort_as_half(word));
}

__host__ __device__ inline float load_element(const void* data, Dtype dtype, long i) {
  return dtype == Dtype::float32 ? static_cast<const float*>(data)[i]
                                 : widen(dtype, static_cast<const std::uint16_t*>(data)[i]);
}

/// A value as a 16-bit word of `dtype`, rounded to nearest even.
__device__ inline std::uint16_t narrow(Dtype dtype, float x) {
  return dtype == Dtype::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

/// Writes a value that `dtype` can store exactly, or rounds it to nearest even.
__device__ inline void store_element(void* data, Dtype dtype, long i, float x) {
  if (dtype == Dtype::float32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<std::uint16_t*>(data)[i] = narrow(dtype, x);
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

/// The same of what load_eight reads.
__device__ inline void store_eight(void* data, Dtype dtype, long i, const float (&x)[8]) {
  unsigned word[4];
#pragma unroll
  for (int k = 0; k < 4; ++k)
    word[k] = narrow(dtype, x[2 * k]) | static_cast<unsigned>(narrow(dtype, x[2 * k + 1])) << 16;
  *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(data) + i) = make_uint4(word[0], word[1], word[2], word[3]);
}

/// Elements i .. i + width - 1: one of any array, or eight of a 16-bit one, i a multiple of 8.
template <int width>
__device__ void load_channels(const void* data, Dtype dtype, long i, float (&x)[width]) {
  if constexpr (width == 8)
    load_eight(data, dtype, i, x);
  else
    x[0] = load_element(data, dtype, i);
}
template <int width>
__device__ void store_channels(void* data, Dtype dtype, long i, const float (&x)[width]) {
  if constexpr (width == 8)
    store_eight(data, dtype, i, x);
  else
    store_element(data, dtype, i, x[0]);
}

/// core/rounding.hpp's round_to.
__device__ inline float round_as(Dtype dtype, float x) {
  return dtype == Dtype::bfloat16  ? __bfloat162float(__float2bfloat16_rn(x))
         : dtype == Dtype::float16 ? __half2float(__float2half_rn(x))
                                   : x;
}

/// A row that can be read eight elements at a time, whatever else it may be.
struct EightsOfRow {
  const void* data;
  Dtype elements;
  __device__ void eight(int first, float (&x)[8]) const { load_eight(data, elements, first, x); }
};

/// One key or value in device memory: policies/views.hpp's Row for hooks on the GPU.
struct DeviceRow {
  const void* data;
  int dim;
  Dtype elements;
  __host__ __device__ float operator[](int c) const { return load_element(data, elements, c); }
  __device__ bool in_eights() const { return kv::in_eights(elements, dim); }
  __device__ void load_eight(int c, float (&x)[8]) const { kv::load_eight(data, elements, c, x); }
  __device__ void eight(int first, float (&x)[8]) const {
    if (in_eights()) return load_eight(first, x);
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = first + k < dim ? (*this)[first + k] : 0.f;
  }
  template <class F, class... Others>
  __device__ void each_eight(F f, Others... others) const {
    if (in_eights())
#pragma unroll 4
      for (int first = 0; first < dim; first += 8) call_with_eight(f, first, 8, eights(), others.eights()...);
    else
      for (int first = 0; first < dim; first += 8) call_with_eight(f, first, min(8, dim - first), *this, others...);
  }
  __device__ EightsOfRow eights() const { return {data, elements}; }
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
  if (bytes % 16 == 0) {  // a warp's share is one word, or few
#pragma unroll 1
    for (int i = thread; i < bytes / 16; i += threads)
      reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(source)[i];
  } else {
#pragma unroll 1
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

/// Rows from[0 .. count) of an array go to rows to[0 .. count), which are others; by all threads, each with several words
/// under way.
__device__ __noinline__ inline void move_rows(void* rows, int row_bytes, int count, const int* from, const int* to) {
  const auto move = [&]<class Word>(Word) {
    constexpr int ahead = 8;
    const int words = row_bytes / static_cast<int>(sizeof(Word)), all = count * words;
    Word* const memory = static_cast<Word*>(rows);
    for (int first = static_cast<int>(threadIdx.x); first < all; first += ahead * team_threads) {
      Word mine[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k)
        if (const int i = first + k * team_threads; i < all)
          mine[k] = memory[static_cast<long>(from[i / words]) * words + i % words];
#pragma unroll
      for (int k = 0; k < ahead; ++k)
        if (const int i = first + k * team_threads; i < all)
          memory[static_cast<long>(to[i / words]) * words + i % words] = mine[k];
    }
  };
  row_bytes % 16 == 0 ? move(uint4{}) : move(std::uint16_t{});
}

}  // namespace kv
