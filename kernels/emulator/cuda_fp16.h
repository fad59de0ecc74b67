// float16 as kernels/ uses it.
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
inline float __half2float(__half x) { return static_cast<float>(std::bit_cast<_Float16>(x.word)); }
inline __half __float2half_rn(float x) { return {std::bit_cast<std::uint16_t>(static_cast<_Float16>(x))}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
template <class Pair = float2>
Pair __half22float2(__half2 x) {
  return {__half2float(x.x), __half2float(x.y)};
}
