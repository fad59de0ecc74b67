// Tiles of 16-bit elements in shared memory, as matrices for tensor cores (sm_80 and later).
#pragma once
#include "kernels/tensor_words.cuh"

namespace kv::blocks {

/// Byte offset of 8 elements of a row in a tile of D elements a row. Chunks of a row are exchanged so that 8 rows' equal
/// chunks lie in different banks.
template <int D>
__device__ uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * D * 2 + ((chunk ^ (row & 7)) << 4));
}

/// Starts copying `rows` rows of `dim` elements (a multiple of 8) to a tile, zeros up to the next multiple of 16.
/// `row_at(i)` is row i's address or null for a row of zeros.
template <int D, int threads, class RowAt>
__device__ void load_rows(uint32_t tile, int rows, int dim, const void* any, RowAt row_at) {
  constexpr int chunks = D / 8;
  const int used = (dim + 15) / 16 * 2;
  for (int i = static_cast<int>(threadIdx.x); i < rows * chunks; i += threads) {
    const int row = i / chunks, chunk = i % chunks;
    if (chunk >= used) continue;
    const char* from = static_cast<const char*>(row_at(row));
    const bool real = from != nullptr && chunk * 8 < dim;
    copy_16(tile + chunk_offset<D>(row, chunk), real ? from + chunk * 16 : any, real);
  }
}

/// s += A B^T for 16 rows of tile `a` from `row` on and the first 8 N rows of tile `b`, over `dim` elements. Lane l holds
/// in s[n] rows l/4 and l/4 + 8 (two each), columns 8n + 2(l%4) and the next.
template <class Element, int D, int N>
__device__ void add_dots(float (&s)[N][4], uint32_t a, int row, uint32_t b, int dim) {
  const int lane = static_cast<int>(threadIdx.x % 32), steps = (dim + 15) / 16;
#pragma unroll 2
  for (int k = 0; k < steps; ++k) {
    const uint4 left = load_matrices(a + chunk_offset<D>(row + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const uint4 right = load_matrices(b + chunk_offset<D>(n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      Words<Element>::mma(s[n], {left.x, left.y, left.z, left.w}, right.x, right.y);
      Words<Element>::mma(s[n + 1], {left.x, left.y, left.z, left.w}, right.z, right.w);
    }
  }
}

template <int N>
__device__ void set_zero(float (&s)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0;
}

/// s = A B^T.
template <class Element, int D, int N>
__device__ void dot_tile(float (&s)[N][4], uint32_t a, int row, uint32_t b, int dim) {
  set_zero(s);
  add_dots<Element, D>(s, a, row, b, dim);
}

/// o += P V: P is a dot_tile's 16 x 8N weights, both words of each, or, `fast`, each rounded to one; V has 8N rows of
/// `dim` elements.
template <class Element, int D, int N, bool fast>
__device__ void add_values(float (&o)[D / 8][4], const float (&p)[N][4], uint32_t v, int dim) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    [[maybe_unused]] uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&block)[4] = p[2 * k + i / 2];
      if constexpr (fast)
        high[i] = Words<Element>::pack(block[i % 2 * 2], block[i % 2 * 2 + 1]);
      else
        Words<Element>::split(block[i % 2 * 2], block[i % 2 * 2 + 1], high[i], low[i]);
    }
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      if (n * 8 >= dim) continue;
      const uint4 right = load_turned(v + chunk_offset<D>(k * 16 + lane % 16, n + lane / 16));
      Words<Element>::mma(o[n], high, right.x, right.y);
      Words<Element>::mma(o[n + 1], high, right.z, right.w);
      if constexpr (fast) continue;
      Words<Element>::mma(o[n], low, right.x, right.y);
      Words<Element>::mma(o[n + 1], low, right.z, right.w);
    }
  }
}

}  // namespace kv::blocks
