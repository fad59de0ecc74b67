// What a stored value can be: rounding to a trace's type.
#pragma once
#include <Eigen/Core>
#include <bit>
#include <cstdint>

#include "core/dtype.hpp"

namespace kv {

/// The nearest finite-input value that `dtype` can store, ties to even. A template so that loops over rows vectorise.
template <Dtype dtype>
inline float rounded(float x) {
  if constexpr (dtype == Dtype::float16) return static_cast<float>(Eigen::half(x));
  if constexpr (dtype == Dtype::bfloat16) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    return std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
  }
  return x;
}

inline float round_to(Dtype dtype, float x) {
  return dtype == Dtype::float16    ? rounded<Dtype::float16>(x)
         : dtype == Dtype::bfloat16 ? rounded<Dtype::bfloat16>(x)
                                    : x;
}

}  // namespace kv
