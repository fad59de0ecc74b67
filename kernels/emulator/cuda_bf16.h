// bfloat16 as kernels/ uses it.
#pragma once
#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  std::uint16_t word;
};

inline std::uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.word; }
inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.word) << 16);
}
/// To nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
