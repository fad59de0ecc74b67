// One head's output against full attention's, for whoever has it: a unit's own thread block or a grid-wide kernel.
#pragma once
#include "kernels/unit.hpp"

namespace kv {

/// Records what went wrong first in a unit; false when something had before.
__device__ inline bool record_error(Progress& progress, UnitError error, int a, int b = 0, int c = 0) {
  if (atomicCAS(reinterpret_cast<int*>(&progress.error), 0, static_cast<int>(error)) != 0) return false;
  progress.error_at[0] = a, progress.error_at[1] = b, progress.error_at[2] = c;
  return true;
}

/// The m-th of `count` measured queries as head g of a unit sees it.
struct MeasuredHead {
  int g, m, count, token;
};

/// What full attention gives it, [value_dim].
__device__ inline const float* full_output_of(const Unit& unit, const LayerData& layer, const TraceData& trace,
                                              const MeasuredHead& head) {
  const int row = (unit.info.kv_head * head.count + head.m) * trace.group + head.g;
  return layer.full_output + static_cast<long>(row) * trace.value_dim;
}

/// Sums over every `lanes` neighbours of four numbers a lane, each in the order of a butterfly over half of them, a quarter, and so
/// on: the first quarter of the lanes has the first one's, the next the second one's, and so on.
template <int lanes>
__device__ double sum_of_four(double a, double b, double c, double d) {
  constexpr int half = lanes / 2, quarter = lanes / 4;
  const bool upper = threadIdx.x / half % 2 != 0, odd = threadIdx.x / quarter % 2 != 0;
  const double e = (upper ? c : a) + __shfl_xor_sync(~0u, upper ? a : c, half);
  const double f = (upper ? d : b) + __shfl_xor_sync(~0u, upper ? b : d, half);
  double sum = (odd ? f : e) + __shfl_xor_sync(~0u, odd ? e : f, quarter);
#pragma unroll
  for (int k = quarter / 2; k > 0; k /= 2) sum += __shfl_xor_sync(~0u, sum, k);
  return sum;
}

/// What a lane has seen of an output and full attention's.
struct OutputSums {
  double error2 = 0, full2 = 0, got2 = 0, dot = 0;
  /// Four neighbouring channels; their differences go to `delta`, unless it is null.
  __device__ void add_four(const float4& output, const float4& full, float4* delta) {
    add(output.x, full.x), add(output.y, full.y), add(output.z, full.z), add(output.w, full.w);
    if (delta) *delta = {output.x - full.x, output.y - full.y, output.z - full.z, output.w - full.w};
  }
  __device__ void add(float output, float full_output) {
    const double x = output, full = full_output;
    error2 = fma(x - full, x - full, error2), full2 = fma(full, full, full2);
    got2 = fma(x, x, got2), dot = fma(x, full, dot);
  }
};

/// Keeps the sums over `lanes` neighbours, one head's of a measured query, and lse(), which is asked for while they are added up;
/// by full warps, heads beyond the last keep nothing. What single queries do not need is left to finish_measures.
template <int lanes, class Lse>
__device__ __forceinline__ void keep_sums(const Unit& unit, const TraceData& trace, Progress& progress,
                                          const MeasuredHead& head, const OutputSums& sums, Lse lse) {
  constexpr int quarter = lanes / 4;
  const int lane = static_cast<int>(threadIdx.x % lanes), here = head.g * head.count + head.m;
  double *const to = unit.compared[lane / quarter] + here, *const lost_mass = unit.lost_mass + here;
  const double sum = sum_of_four<lanes>(sums.error2, sums.full2, sums.got2, sums.dot), log_sum = lse();
  if (lane % quarter != 0 || head.g >= trace.group) return;
  if (lane <= quarter && !isfinite(sum))
    record_error(progress, UnitError::not_finite, unit.info.kv_head * trace.group + head.g, head.token);
  *to = sum;
  if (lane == 0) *lost_mass = log_sum;
}

/// Compares one head's output of a measured query with full attention's; by one warp.
__device__ __forceinline__ void compare_outputs(const Unit& unit, const TraceData& trace, Progress& progress,
                                                const MeasuredHead& head, const float* output, const float* full_output,
                                                double lse) {
  const int dv = trace.value_dim, lane = static_cast<int>(threadIdx.x % 32);
  const long in_delta = static_cast<long>(head.m) * trace.group + head.g;
  float* const delta = unit.delta ? unit.delta + in_delta * dv : nullptr;
  OutputSums sums;
  if (dv % 4 == 0) {
    for (int c = 4 * lane; c < dv; c += 4 * 32)
      sums.add_four(*reinterpret_cast<const float4*>(output + c), *reinterpret_cast<const float4*>(full_output + c),
                    delta ? reinterpret_cast<float4*>(delta + c) : nullptr);
  } else {
    for (int c = lane; c < dv; c += 32) {
      sums.add(output[c], full_output[c]);
      if (delta) delta[c] = output[c] - full_output[c];
    }
  }
  keep_sums<32>(unit, trace, progress, head, sums, [&] { return lse; });
}

}  // namespace kv
