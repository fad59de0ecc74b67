// Many divisions by one number.
#pragma once
#include <cuda_runtime.h>

#include <cmath>

namespace kv {

/// Quotients of one divisor, to the bit: from its reciprocal by two corrections (Markstein 1990, IBM J. Res. Dev. 34:1), where
/// nothing comes near an overflow or underflow.
struct Quotients {
  static constexpr float least = 0x1p-60f, most = 0x1p60f;
  const float divisor, reciprocal;
  __device__ explicit Quotients(float d) : divisor(d), reciprocal(1 / d) {}
  template <int step>
  __device__ void divide(float (&x)[step]) const {
    if constexpr (step == 1) {
      x[0] /= divisor;
      return;
    }
    float smallest = std::abs(divisor), largest = smallest;
#pragma unroll
    for (const float each : x) smallest = fminf(smallest, std::abs(each)), largest = fmaxf(largest, std::abs(each));
    if (smallest >= least && largest <= most) {
#pragma unroll
      for (float& each : x) {
        float q = each * reciprocal;
        q = __fmaf_rn(__fmaf_rn(-q, divisor, each), reciprocal, q);
        each = __fmaf_rn(__fmaf_rn(-q, divisor, each), reciprocal, q);
      }
    } else {
#pragma unroll 1
      for (float& each : x) each /= divisor;
    }
  }
};

}  // namespace kv
