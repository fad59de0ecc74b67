// 16-bit elements as tensor cores take them.
#pragma once
#include "kernels/instructions.cuh"

namespace kv {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

/// Where a chunk of 16 bytes of a row lies in a tile that is swizzled as hardware does it: halves of 64 elements a row,
/// `half_bytes` apart, whose rows are 128 bytes with chunks exchanged within every 8 rows.
__device__ constexpr uint32_t swizzled_place(uint32_t row, uint32_t chunk, uint32_t half_bytes) {
  return chunk / 8 * half_bytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

/// A float in two 16-bit words: 16 (bfloat16) or 22 (float16) bits of it, relative error of the sum of both about 1e-5 or
/// better. Probabilities are scaled by 2^shift first, so that what float16 cannot hold is below 2^-38 of the largest. They
/// are relative to a base that lags behind the largest logit by at most `slack` (in units of log 2): so it seldom moves.
template <class Element>
struct Words;

template <>
struct Words<__nv_bfloat16> {
  static constexpr int shift = 0, slack = 8;

  static __device__ uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
  static __device__ float2 unpack(uint32_t packed) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
  }
  /// The high words are cut off, not rounded: then the rest is exact before its own rounding.
  static __device__ void split(float x, float y, uint32_t& high, uint32_t& low) {
    const uint32_t x_bits = __float_as_uint(x), y_bits = __float_as_uint(y);
    high = __byte_perm(x_bits, y_bits, 0x7632);
    low = pack(x - __uint_as_float(x_bits & 0xffff0000u), y - __uint_as_float(y_bits & 0xffff0000u));
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bfloat16(d, a, b0, b1);
  }
};

template <>
struct Words<__half> {
  static constexpr int shift = 14, slack = 1;

  static __device__ uint32_t pack(float low, float high) { return pack_half(low, high); }
  static __device__ float2 unpack(uint32_t packed) {
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  }
  static __device__ void split(float x, float y, uint32_t& high, uint32_t& low) {
    const __half2 rounded = __floats2half2_rn(x, y);
    high = *reinterpret_cast<const uint32_t*>(&rounded);
    const float2 back = __half22float2(rounded);
    low = pack(x - back.x, y - back.y);
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_half(d, a, b0, b1);
  }
};

}  // namespace kv
