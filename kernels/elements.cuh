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

/// Elements i .. i + 7 of a 16-bit array, i a multiple of 8: as they lie, and widened.
__device__ inline uint4 eight_words(const void* data, long i) {
  return *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(data) + i);
}
__device__ inline void widen_eight(Dtype dtype, uint4 words, float (&x)[8]) {
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = widen(dtype, static_cast<std::uint16_t>(word[k / 2] >> k % 2 * 16));
}
/// The same of four.
__device__ inline float4 widen_four(Dtype dtype, uint2 words) {
  return {widen(dtype, static_cast<std::uint16_t>(words.x)), widen(dtype, static_cast<std::uint16_t>(words.x >> 16)),
          widen(dtype, static_cast<std::uint16_t>(words.y)), widen(dtype, static_cast<std::uint16_t>(words.y >> 16))};
}
/// Four neighbouring 16-bit elements of a row, from the c-th on.
__device__ inline float4 load_four(const void* row, Dtype dtype, int c) {
  return widen_four(dtype, *reinterpret_cast<const uint2*>(static_cast<const std::uint16_t*>(row) + c));
}
__device__ inline void load_eight(const void* data, Dtype dtype, long i, float (&x)[8]) {
  widen_eight(dtype, eight_words(data, i), x);
}

/// Two neighbouring 16-bit elements as a word.
__device__ inline unsigned narrow_two(Dtype dtype, float first, float second) {
  return narrow(dtype, first) | static_cast<unsigned>(narrow(dtype, second)) << 16;
}
/// The same of what load_eight reads.
__device__ inline void store_eight(void* data, Dtype dtype, long i, const float (&x)[8]) {
  unsigned word[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) word[k] = narrow_two(dtype, x[2 * k], x[2 * k + 1]);
  *reinterpret_cast<uint4*>(static_cast<std::uint16_t*>(data) + i) = make_uint4(word[0], word[1], word[2], word[3]);
}

/// Elements i .. i + width - 1: one of any array, or eight of a 16-bit one, i a multiple of 8. Eight are read without being
/// widened, which would wait for them.
template <int width>
__device__ auto read_channels(const void* data, Dtype dtype, long i) {
  if constexpr (width == 8)
    return eight_words(data, i);
  else
    return load_element(data, dtype, i);
}
__device__ inline void widen_channels(Dtype dtype, uint4 words, float (&x)[8]) { widen_eight(dtype, words, x); }
__device__ inline void widen_channels(Dtype, float element, float (&x)[1]) { x[0] = element; }
template <int width>
__device__ void load_channels(const void* data, Dtype dtype, long i, float (&x)[width]) {
  widen_channels(dtype, read_channels<width>(data, dtype, i), x);
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

/// Eight elements of a row, read but not widened yet.
struct EightWords {
  uint4 words;
  Dtype elements;
  __device__ void eight(int, float (&x)[8]) const { widen_eight(elements, words, x); }
};

/// A row that can be read eight elements at a time, whatever else it may be.
struct EightsOfRow {
  const void* data;
  Dtype elements;
  __device__ void eight(int first, float (&x)[8]) const { load_eight(data, elements, first, x); }
  __device__ EightWords words(int first) const { return {eight_words(data, first), elements}; }
};

/// A row whose next elements are on their way while those before are looked at; beyond its end the last ones again.
template <int ahead>
struct RowAhead {
  const void* data;
  Dtype elements;
  int dim;
  uint4 now[ahead] = {}, next[ahead] = {};
  __device__ void read(int first) {
#pragma unroll
    for (int k = 0; k < ahead; ++k) now[k] = next[k], next[k] = eight_words(data, min(first + 8 * k, dim - 8));
  }
  __device__ EightWords at(int k) const { return {now[k], elements}; }
};

/// f as RowOf::each_eight calls it. The loop's end keeps the compiler from putting every load off to its use.
template <int ahead, class F, class... Rows>
__device__ void each_eight_ahead(F& f, int dim, Rows... rows) {
  (rows.read(0), ...);
#pragma unroll 1
  for (int first = 0; first < dim; first += 8 * ahead) {
    (rows.read(first + 8 * ahead), ...);
#pragma unroll
    for (int k = 0; k < ahead; ++k)
      if (first + 8 * k < dim) call_with_eight(f, first + 8 * k, 8, rows.at(k)...);
  }
}

/// Rows in device memory, one of which may lie in shared memory as well: it was written so lately that reading it would wait.
struct DeviceRows {
  const void* rows = nullptr;
  const void* late_row = nullptr;
  long late = -1;
  DeviceRows() = default;
  __host__ __device__ DeviceRows(const void* all) : rows(all) {}  // NOLINT(google-explicit-constructor)
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
    constexpr int ahead = 8 / (1 + sizeof...(Others));
    if (in_eights())
      each_eight_ahead<ahead>(f, dim, RowAhead<ahead>{data, elements, dim},
                              RowAhead<ahead>{others.data, elements, dim}...);
    else
      for (int first = 0; first < dim; first += 8) call_with_eight(f, first, min(8, dim - first), *this, others...);
  }
  __device__ EightsOfRow eights() const { return {data, elements}; }
  using Rows = DeviceRows;
  __host__ __device__ static DeviceRow at(const Rows& rows, Dtype elements, long index, int dim) {
    const void* const there = static_cast<const char*>(rows.rows) + index * dim * bytes_of(elements);
    return {index == rows.late ? rows.late_row : there, dim, elements};
  }
};

/// A row that is known to be of bfloat16, its dimension a multiple of eight: hooks need no code for any others.
struct PlainRow : DeviceRow {
  __host__ __device__ PlainRow(const DeviceRow& row) : DeviceRow(row) {}  // NOLINT(google-explicit-constructor)
  __host__ __device__ float operator[](int c) const { return load_element(data, Dtype::bfloat16, c); }
  __device__ static constexpr bool in_eights() { return true; }
  __device__ void load_eight(int c, float (&x)[8]) const { kv::load_eight(data, Dtype::bfloat16, c, x); }
  __device__ void eight(int first, float (&x)[8]) const { load_eight(first, x); }
  __device__ EightsOfRow eights() const { return {data, Dtype::bfloat16}; }
  __host__ __device__ static PlainRow at(const Rows& rows, Dtype, long index, int dim) {
    return DeviceRow::at(rows, Dtype::bfloat16, index, dim);
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
/// under way: without branches between their loads, beyond the last row that one's again.
__device__ __noinline__ inline void move_rows(void* rows, int row_bytes, int count, const int* from, const int* to) {
  const auto move = [&]<class Word>(Word) {
    constexpr int ahead = 8;
    const int words = row_bytes / static_cast<int>(sizeof(Word)), lanes = min(words, team_threads);
    const int rows_beside = team_threads / lanes, row = static_cast<int>(threadIdx.x) / lanes;
    if (row >= rows_beside) return;
    for (int word = static_cast<int>(threadIdx.x) % lanes; word < words; word += lanes) {
      Word* const column = static_cast<Word*>(rows) + word;
      for (int first = row; first < count; first += ahead * rows_beside) {
        int target[ahead];
        Word mine[ahead];
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
          const int i = min(first + k * rows_beside, count - 1);
          target[k] = to[i], mine[k] = column[static_cast<long>(from[i]) * words];
        }
#pragma unroll
        for (int k = 0; k < ahead; ++k)
          if (first + k * rows_beside < count) column[static_cast<long>(target[k]) * words] = mine[k];
      }
    }
  };
  row_bytes % 16 == 0 ? move(uint4{}) : move(std::uint16_t{});
}

}  // namespace kv
