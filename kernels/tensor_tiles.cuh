// Tiles of 16-bit elements in shared memory and the warp-wide tensor core product m16n8k16 on them (sm_80 and later).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace kv::blocks {

/// A float in two 16-bit words: 16 (bfloat16) or 22 (float16) bits of it, relative error of the sum of both about 1e-5 or
/// better. Probabilities are scaled by 2^shift first, so that what float16 cannot hold is below 2^-38 of the largest.
template <class Element>
struct Words;

template <>
struct Words<__nv_bfloat16> {
  static constexpr float shift = 0;

  static __device__ uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  /// The high words are cut off, not rounded: then the rest is exact before its own rounding.
  static __device__ void split(float x, float y, uint32_t& high, uint32_t& low) {
    const uint32_t x_bits = __float_as_uint(x), y_bits = __float_as_uint(y);
    high = __byte_perm(x_bits, y_bits, 0x7632);
    low = pack(x - __uint_as_float(x_bits & 0xffff0000u), y - __uint_as_float(y_bits & 0xffff0000u));
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Words<__half> {
  static constexpr float shift = 14;

  static __device__ uint32_t pack(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static __device__ void split(float x, float y, uint32_t& high, uint32_t& low) {
    const __half2 rounded = __floats2half2_rn(x, y);
    high = *reinterpret_cast<const uint32_t*>(&rounded);
    const float2 back = __half22float2(rounded);
    low = pack(x - back.x, y - back.y);
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// Starts copying 16 bytes to shared memory; all zero unless `real`.
__device__ inline void copy_16(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ inline void copy_4(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `pending` of the thread's last groups of copies are under way.
template <int pending>
__device__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

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

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// s += A B^T for 16 rows of tile `a` from `row` on and the first 8 N rows of tile `b`, over `dim` elements. Lane l holds
/// in s[n] rows l/4 and l/4 + 8 (two each), columns 8n + 2(l%4) and the next.
template <class Element, int D, int N>
__device__ void add_dots(float (&s)[N][4], uint32_t a, int row, uint32_t b, int dim) {
  const int lane = static_cast<int>(threadIdx.x % 32), steps = (dim + 15) / 16;
#pragma unroll 2
  for (int k = 0; k < steps; ++k) {
    uint32_t left[4], right[4];
    load_matrices(left, a + chunk_offset<D>(row + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      load_matrices(right, b + chunk_offset<D>(n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      Words<Element>::mma(s[n], left, right[0], right[1]);
      Words<Element>::mma(s[n + 1], left, right[2], right[3]);
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

/// o += P V: P is a dot_tile's 16 x 8N weights, both words of each; V has 8N rows of `dim` elements.
template <class Element, int D, int N>
__device__ void add_values(float (&o)[D / 8][4], const float (&p)[N][4], uint32_t v, int dim) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    uint32_t high[4], low[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&block)[4] = p[2 * k + i / 2];
      Words<Element>::split(block[i % 2 * 2], block[i % 2 * 2 + 1], high[i], low[i]);
    }
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      if (n * 8 >= dim) continue;
      load_transposed(right, v + chunk_offset<D>(k * 16 + lane % 16, n + lane / 16));
      Words<Element>::mma(o[n], high, right[0], right[1]);
      Words<Element>::mma(o[n + 1], high, right[2], right[3]);
      Words<Element>::mma(o[n], low, right[0], right[1]);
      Words<Element>::mma(o[n + 1], low, right[2], right[3]);
    }
  }
}

}  // namespace kv::blocks
