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

/// A streamed row's output of one head, with what it lacks, against full attention's; by half a warp, while the other half has
/// another head. `trace`: f.trace, from where it is read at the least cost.
template <class Lacks>
__device__ __forceinline__ void measure_half(Fixed& f, const TraceData& trace, const MeasuredHead& head,
                                             const TokenAttention::HeadOutput& output, const Lacks& lacks,
                                             const float* full_output) {
  const int last = min(head.g, trace.group - 1), row = head.m * trace.group + last;
  const SoftmaxPart whole = f.row.whole[last];
  float* const delta = f.unit.delta;
  OutputSums sums;
  output.each([&](int c, float4 o) {
    lacks.add_to(c, o);
    float4* const to = reinterpret_cast<float4*>(delta + static_cast<long>(row) * trace.value_dim + c);
    sums.add_four(o, *reinterpret_cast<const float4*>(full_output + c), delta ? to : nullptr);
  });
  keep_sums<16>(f.unit, trace, f.progress, head, sums,
                [&] { return static_cast<double>(TokenAttention::log_sum_of(whole)); });
}
/// The same as a call.
template <class Lacks>
__device__ __noinline__ void measure_half_apart(Fixed& f, const TraceData& trace, const MeasuredHead& head,
                                                const TokenAttention::HeadOutput& output, const Lacks& lacks,
                                                const float* full_output) {
  measure_half(by_kept_address(f), trace, head, output, lacks, full_output);
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
