// float16 as kernels/ uses it, by its bits: where the processor knows float16 itself, GCC 12 may leave out the rounding.
#pragma once
#include <bit>
#include <cstdint>

struct __half {
  std::uint16_t word;
};
struct __half2 {
  __half x, y;
};
struct float2;

inline __half __ushort_as_half(std::uint16_t word) { return {word}; }
inline std::uint16_t __half_as_ushort(__half x) { return x.word; }
inline float __half2float(__half x) {
  const std::uint32_t sign = (x.word & 0x8000u) << 16, rest = x.word & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | rest << 13);
  if (rest >= 0x0400u) return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  const float size = static_cast<float>(rest) * 0x1p-24f;
  return sign != 0 ? -size : size;
}
inline __half __float2half_rn(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x), sign = bits >> 16 & 0x8000u;
  std::uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u)
    size = 0x7e00u;
  else if (size >= 0x477ff000u)  // rounds to 65536
    size = 0x7c00u;
  else if (size < 0x38800000u)  // the unit in the last place of 0.5 is float16's smallest number
    size = std::bit_cast<std::uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  else
    size = (size + 0xc8000fffu + (size >> 13 & 1)) >> 13;
  return {static_cast<std::uint16_t>(sign | size)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
template <class Pair = float2>
Pair __half22float2(__half2 x) {
  return {__half2float(x.x), __half2float(x.y)};
}
