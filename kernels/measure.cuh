// Outputs against full attention.
#pragma once
#include "kernels/play.cuh"

namespace kv {

/// What full attention gives a head of the m-th measured query, [value_dim].
__device__ inline const float* full_output_of(const Fixed& f, int g, int m) {
  const long row = (static_cast<long>(f.unit.info.kv_head) * f.settings.measured_count + m) * f.trace.group + g;
  return f.layer.full_output + row * f.trace.value_dim;
}

/// Compares one head's output of a measured query, the m-th, with full attention's; by one warp. What single queries do not
/// need is left to finish_measures: cosine holds o . o' and lost_mass the log-sum-exp until then.
__device__ __noinline__ inline void measure_head(Fixed& f, int g, int m, int token, const float* output,
                                                 const float* full_output, double lse) {
  const Unit& unit = f.unit;
  const int dv = f.trace.value_dim, lane = static_cast<int>(threadIdx.x % 32), head = unit.info.kv_head;
  const long in_delta = static_cast<long>(m) * f.trace.group + g;
  const long here = static_cast<long>(g) * f.settings.measured_count + m;
  double error2 = 0, full2 = 0, got2 = 0, dot = 0;
  for (int c = lane; c < dv; c += 32) {
    const double x = output[c], full = full_output[c];
    error2 += (x - full) * (x - full), full2 += full * full, got2 += x * x, dot += x * full;
    if (unit.delta) unit.delta[in_delta * dv + c] = output[c] - full_output[c];
  }
  for (int k = 16; k > 0; k /= 2) {
    error2 += __shfl_xor_sync(~0u, error2, k), full2 += __shfl_xor_sync(~0u, full2, k);
    got2 += __shfl_xor_sync(~0u, got2, k), dot += __shfl_xor_sync(~0u, dot, k);
  }
  if (lane != 0) return;
  if (!isfinite(error2) || !isfinite(full2)) Play(f).fail(UnitError::not_finite, head * f.trace.group + g, token);
  unit.error2[here] = error2, unit.output2[here] = full2;
  unit.cosine[here] = dot, unit.got2[here] = got2, unit.lost_mass[here] = lse;  // the rest can wait: finish_measures
}

/// The cosine and the lost mass of every measured query, from what measure_head left.
__device__ inline void finish_measures(const Play& play) {
  const Unit& unit = play.unit;
  const int count = play.settings.measured_count;
  play.team.for_each(play.trace.group * count, [&](int i) {
    const double full2 = unit.output2[i], got2 = unit.got2[i];
    unit.cosine[i] = got2 > 0 && full2 > 0 ? 1 - unit.cosine[i] / sqrt(got2 * full2) : static_cast<double>(NAN);
    // What remains visible of an unmerged cache are the same exponentials: their sum says what is missing.
    const long in_full = (static_cast<long>(unit.info.kv_head) * count + i % count) * play.trace.group + i / count;
    const double missing = 1 - exp(unit.lost_mass[i] - static_cast<double>(play.layer.full_lse[in_full]));
    unit.lost_mass[i] = missing > 0 ? missing : 0;
  });
}

}  // namespace kv
