// Outputs against full attention.
#pragma once
#include "kernels/comparison.cuh"
#include "kernels/play.cuh"

namespace kv {

/// compare_outputs of the m-th measured query; by one warp.
__device__ __noinline__ inline void measure_head(Fixed& f, int g, int m, int token, const float* output,
                                                 const float* full_output, double lse) {
  compare_outputs(f.unit, f.trace, f.progress, {g, m, f.settings.measured_count, token}, output, full_output, lse);
}

/// A streamed row's output of one head, four channels a lane, against full attention's; by one warp. `trace`: f.trace, from where
/// it is read at the least cost.
__device__ __forceinline__ void measure_lanes(Fixed& f, const TraceData& trace, const MeasuredHead& head, float4 output,
                                              const float* full_output) {
  const int c = 4 * static_cast<int>(threadIdx.x % 32), dv = trace.value_dim;
  const SoftmaxPart whole = f.row.whole[head.g];
  OutputSums sums;
  if (c < dv) {
    float* const delta = f.unit.delta;
    sums.add_four(
        output, *reinterpret_cast<const float4*>(full_output + c),
        delta ? reinterpret_cast<float4*>(delta + static_cast<long>(head.m * trace.group + head.g) * dv + c) : nullptr);
  }
  keep_sums(f.unit, trace, f.progress, head, sums,
            [&] { return static_cast<double>(TokenAttention::log_sum_of(whole)); });
}
/// The same as a call.
__device__ __noinline__ inline void measure_lanes_apart(Fixed& f, const TraceData& trace, const MeasuredHead& head,
                                                        float4 output, const float* full_output) {
  measure_lanes(by_kept_address(f), trace, head, output, full_output);
}

/// The cosine and the lost mass of every measured query, from what measure_head left.
__device__ inline void finish_measures(const Play& play) {
  const Unit& unit = play.unit;
  const int count = play.settings.measured_count;
  play.team.for_each(play.trace.group * count, [&](int i) {
    const double full2 = unit.compared[1][i], got2 = unit.compared[2][i];
    double& cosine = unit.compared[3][i];
    cosine = got2 > 0 && full2 > 0 ? 1 - cosine / sqrt(got2 * full2) : static_cast<double>(NAN);
    // What remains visible of an unmerged cache are the same exponentials: their sum says what is missing.
    const long in_full = (static_cast<long>(unit.info.kv_head) * count + i % count) * play.trace.group + i / count;
    const double missing = 1 - exp(unit.lost_mass[i] - static_cast<double>(play.layer.full_lse[in_full]));
    unit.lost_mass[i] = missing > 0 ? missing : 0;
  });
}

}  // namespace kv
