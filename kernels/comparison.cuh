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

/// What full attention gives head g of a unit for the m-th of `count` measured queries, [value_dim].
__device__ inline const float* full_output_of(const Unit& unit, const LayerData& layer, int group, int value_dim, int g,
                                              int m, int count) {
  return layer.full_output + ((static_cast<long>(unit.info.kv_head) * count + m) * group + g) * value_dim;
}

/// Sums over each `lanes` neighbouring lanes of a warp of four numbers a lane, in the order of a butterfly: the first quarter
/// of them has the first one's, the next the second one's, and so on.
template <int lanes>
__device__ double sum_of_four(double a, double b, double c, double d) {
  const unsigned lane = threadIdx.x % lanes;
  const bool upper = lane >= lanes / 2, odd = lane / (lanes / 4) % 2 != 0;
  const double e = (upper ? c : a) + __shfl_xor_sync(~0u, upper ? a : c, lanes / 2);
  const double f = (upper ? d : b) + __shfl_xor_sync(~0u, upper ? b : d, lanes / 2);
  double sum = (odd ? f : e) + __shfl_xor_sync(~0u, odd ? e : f, lanes / 4);
  for (int k = lanes / 8; k > 0; k /= 2) sum += __shfl_xor_sync(~0u, sum, k);
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

/// Keeps the sums over `lanes` neighbouring lanes, one head's of a measured query, if it is `there`. What single queries do not
/// need is left to finish_measures. For whole warps.
template <int lanes>
__device__ __forceinline__ void keep_sums(const Unit& unit, Progress& progress, int head, int token, long here,
                                          const OutputSums& sums, double lse, bool there = true) {
  const int lane = static_cast<int>(threadIdx.x % lanes), which = lane / (lanes / 4);
  const double sum = sum_of_four<lanes>(sums.error2, sums.full2, sums.got2, sums.dot);
  if (!there || lane % (lanes / 4) != 0) return;
  if (which <= 1 && !isfinite(sum)) record_error(progress, UnitError::not_finite, head, token);
  unit.compared[which][here] = sum;
  if (lane == 0) unit.lost_mass[here] = lse;
}

/// One head's output of a row of a look, which `lanes` neighbouring lanes have parts of.
template <int lanes>
struct ComparedRow {
  const OutputComparison& with;
  const Unit& unit = *with.unit;
  const int group, g, token, m;  // m: of the measured queries, -1 = it is none
  const float* const full_output;
  float* const delta;
  OutputSums& sums;

  __device__ ComparedRow(const OutputComparison& comparison, const AttentionShape& shape, int head, int row_token,
                         bool there, OutputSums& of)
      : with(comparison),
        group(shape.group),
        g(head),
        token(row_token),
        m(there ? with.measured_of_token[row_token] : -1),
        full_output(full_output_of(unit, *with.layer, group, shape.value_dim, g, max(m, 0), with.measured_count)),
        delta(unit.delta && m >= 0 ? unit.delta + (static_cast<long>(m) * group + g) * shape.value_dim : nullptr),
        sums(of) {}

  /// Channel c of it.
  __device__ void add(int c, float output) {
    const float full = full_output[c];
    sums.add(output, full);
    if (delta) delta[c] = output - full;
  }
  /// Channels c and c + 1, where c and all dims are even.
  __device__ void add_two(int c, float2 output) {
    const float2 full = *reinterpret_cast<const float2*>(full_output + c);
    sums.add(output.x, full.x), sums.add(output.y, full.y);
    if (delta) *reinterpret_cast<float2*>(delta + c) = {output.x - full.x, output.y - full.y};
  }
  /// When all channels have been added. For whole warps.
  __device__ void keep(float lse) const {
    keep_sums<lanes>(unit, *with.progress, unit.info.kv_head * group + g, token,
                     static_cast<long>(g) * with.measured_count + m, sums, static_cast<double>(lse), m >= 0);
  }
};

}  // namespace kv
