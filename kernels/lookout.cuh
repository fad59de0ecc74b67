// What a unit knows beyond its own cache: full attention of single rows (for oracles and the mass metric), and statistics
// of its queries. core/future_mass.cpp, core/query_statistics.cpp and HeadReplay::measure_mass are the same on the CPU.
#pragma once
#include "kernels/play.cuh"

namespace kv {

/// Full attention of one token's queries over the trace, in unit.full_logits [group][tokens] and row.log_sum; the cache's own
/// row is forgotten. Gives a barrier.
__device__ __noinline__ inline void attend_in_full(Play& play, int token) {
  const Unit& unit = play.unit;
  const TraceData& trace = play.trace;
  const long head = static_cast<long>(unit.info.kv_head) * trace.tokens;
  if (threadIdx.x == 0) {
    RowLook& look = play.fixed.look;
    look = RowLook{};
    look.keys = play.at(play.layer.k_rotated, head, trace.key_dim);
    look.values = play.at(play.layer.v, head, trace.value_dim);
    if (play.fixed.streamed) look.from = {&play.layer.maps->keys, &play.layer.maps->values, unit.info.kv_head};
    look.key_dim = trace.key_dim, look.value_dim = trace.value_dim, look.group = trace.group;
    look.scale = trace.scale, look.softcap = trace.softcap;
    look.token = unit.every_token;
    look.window = play.layer.window, look.masked = play.layer.window > 0;
    look.logits = unit.full_logits, look.logit_stride = logit_stride(trace.tokens);
  }
  __syncthreads();
  const long first = static_cast<long>(play.query_head(0)) * play.layer.query_rows + play.layer.row_of_token[token];
  Play::attend<0>(
      play,
      {play.at(play.layer.q_rotated, first, trace.key_dim), static_cast<long>(play.layer.query_rows) * trace.key_dim},
      token, token);
}

/// Probability that full attention gives `t` in the row that attend_in_full left.
__device__ inline float full_probability(const Play& play, int g, int t) {
  const float logit = play.unit.full_logits[static_cast<long>(g) * logit_stride(play.trace.tokens) + t];
  return exp2f((logit - play.row.log_sum[g]) * log2_e);
}

/// Adds `sign` times the group's mean mass that the queries of tokens [first, last) give to every token. The same numbers
/// go that came, so what is left of nothing is rounding, and taken for nothing.
__device__ __noinline__ inline void add_future(Play& play, int first, int last, double sign) {
  const Unit& unit = play.unit;
  const double share = sign / play.trace.group;
  for (int token = first; token < last; ++token) {
    if (play.layer.row_of_token[token] < 0) continue;
    attend_in_full(play, token);
    play.team.for_each(token + 1, [&](int t) {
      double mass = 0;
      for (int g = 0; g < play.trace.group; ++g) mass += share * static_cast<double>(full_probability(play, g, t));
      unit.future_left[t] += mass;
      if (sign > 0) unit.future_all[t] += mass;
      if (unit.future_left[t] < 1e-12 * unit.future_all[t]) unit.future_left[t] = 0;
    });
    __syncthreads();
  }
}

/// mass_tv of one measured query: half the distance between the slots' masses (in `own`, [group][own_stride] logits and
/// their log-sum-exps) and the full ones of the tokens that each stands for; lost tokens count in full. Sums are integers,
/// so their order does not matter.
__device__ __noinline__ inline void measure_mass(Play& play, int m, int token, const float* own, int own_stride,
                                                 const float* bias) {
  const Unit& unit = play.unit;
  const BlockTeam team = play.team;
  constexpr double unit_mass = 1ll << 52;
  long long* mass = unit.slot_mass;  // [capacity + 1]; the last is that of lost tokens
  float own_lse[16];
  for (int g0 = 0; g0 < play.trace.group; g0 += 16) {
    const int heads = min(16, play.trace.group - g0);
    if (g0 > 0) {  // the full row took the place of the own one's log-sum-exps
      play.look_at(token, bias);
      Play::attend<0>(play, play.queries_of(token), token, play.size - 1);
    }
    for (int g = 0; g < heads; ++g) own_lse[g] = play.row.log_sum[g0 + g];
    __syncthreads();
    attend_in_full(play, token);
    for (int g = g0; g < g0 + heads; ++g) {
      team.for_each(unit.capacity + 1, [&](int s) { mass[s] = 0; });
      __syncthreads();
      team.for_each(token + 1, [&](int t) {
        int stands = t;
        while (stands >= 0 && unit.parent[stands] != stands) stands = unit.parent[stands];
        const int slot = stands < 0 ? unit.capacity : play.slot_of_query(stands, play.size);
        const double p = full_probability(play, g, t);
        atomicAdd(reinterpret_cast<unsigned long long*>(&mass[slot]),
                  static_cast<unsigned long long>(llrint(p * unit_mass)));
      });
      __syncthreads();
      long long moved = 0;
      team.for_each(play.size, [&](int s) {
        if (unit.token[s] > token) return;
        const float logit = own[static_cast<long>(g) * own_stride + s];
        const float x = bias ? logit + bias[s] : logit;
        const double p = exp2f((x - own_lse[g - g0]) * log2_e);
        const long long difference = llrint(p * unit_mass) - mass[s];
        moved += difference < 0 ? -difference : difference;
      });
      __syncthreads();
      if (threadIdx.x == 0) moved += mass[unit.capacity];
      if (threadIdx.x == 0) mass[0] = 0;
      __syncthreads();
      atomicAdd(reinterpret_cast<unsigned long long*>(&mass[0]), static_cast<unsigned long long>(moved));
      __syncthreads();
      if (threadIdx.x == 0)
        unit.mass_tv[static_cast<long>(g) * play.settings.measured_count + m] =
            static_cast<double>(mass[0]) / unit_mass / 2;
      __syncthreads();
    }
  }
}

/// Adds the unrotated queries of tokens [first, last) that were recorded.
__device__ __noinline__ inline void add_queries(Fixed& fixed, int first, int last) {
  const Play play(fixed);
  const Unit& unit = play.unit;
  const TraceData& trace = play.trace;
  const int d = trace.key_dim;
  const auto query = [&](int g, int token, int c) -> double {
    const long row = static_cast<long>(play.query_head(g)) * play.layer.query_rows + play.layer.row_of_token[token];
    return load_element(play.layer.q, trace.elements, row * d + c);
  };
  play.team.for_each(trace.group * d, [&](int i) {
    double sum = unit.query_sum[i];
    for (int t = first; t < last; ++t)
      if (play.layer.row_of_token[t] >= 0) sum += query(i / d, t, i % d);
    unit.query_sum[i] = sum;
  });
  play.team.for_each(trace.group * d * d, [&](int i) {
    const int g = i / (d * d), a = i / d % d, b = i % d;
    double sum = unit.query_outer[i];
    for (int t = first; t < last; ++t)
      if (play.layer.row_of_token[t] >= 0) sum += query(g, t, a) * query(g, t, b);
    unit.query_outer[i] = sum;
  });
  if (threadIdx.x == 0)
    for (int t = first; t < last; ++t) play.progress.queries += play.layer.row_of_token[t] >= 0;
  __syncthreads();
}

/// Mean and covariance of the queries so far, rotated by the mean of the rotations to the `horizon` positions after the
/// newest token. Gives a barrier.
__device__ __noinline__ inline void look_ahead(Fixed& fixed, int now, int horizon) {
  const Play play(fixed);
  const Unit& unit = play.unit;
  const TraceData& trace = play.trace;
  const int d = trace.key_dim, first = trace.position[now] + 1, count = play.progress.queries;
  if (count == 0) {
    play.team.for_each(trace.group * d, [&](int i) { unit.query_mean[i] = 0; });
    play.team.for_each(trace.group * d * d, [&](int i) { unit.query_covariance[i] = 0; });
    __syncthreads();
    return;
  }
  double *cos = unit.rotation, *sin = cos + trace.pairs;
  play.team.for_each(trace.pairs, [&](int i) {
    double c = 0, s = 0;
    for (int p = first; p < first + horizon; ++p) {
      const float angle = play.layer.inv_freq[i] * static_cast<float>(p);
      c += cosf(angle), s += sinf(angle);
    }
    cos[i] = c * trace.attention_scaling / horizon, sin[i] = s * trace.attention_scaling / horizon;
  });
  __syncthreads();
  // Row a of the rotation: `own` at a and `other` at its partner.
  struct RotationRow {
    int partner;
    double own, other;
  };
  const auto rotation = [&](int a) -> RotationRow {
    const bool half = trace.half_style, rotated = a < 2 * trace.pairs;
    if (!rotated) return {a, 1, 0};
    const int i = half ? a % trace.pairs : a / 2;
    const bool is_x = half ? a < trace.pairs : a % 2 == 0;
    const int step = half ? trace.pairs : 1;
    return is_x ? RotationRow{a + step, cos[i], -sin[i]} : RotationRow{a - step, cos[i], sin[i]};
  };
  play.team.for_each(trace.group * d, [&](int i) {
    const RotationRow r = rotation(i % d);
    const double* sum = unit.query_sum + i / d * d;
    unit.query_mean[i] = static_cast<float>(r.own * (sum[i % d] / count) + r.other * (sum[r.partner] / count));
  });
  play.team.for_each(trace.group * d * d, [&](int i) {
    const int g = i / (d * d), a = i / d % d, b = i % d;
    const double *sum = unit.query_sum + g * d, *outer = unit.query_outer + static_cast<long>(g) * d * d;
    const auto covariance = [&](int x, int y) { return outer[x * d + y] / count - sum[x] / count * (sum[y] / count); };
    const RotationRow r = rotation(a), s = rotation(b);
    const double own = r.own * covariance(a, b) + r.other * covariance(r.partner, b);
    const double other = r.own * covariance(a, s.partner) + r.other * covariance(r.partner, s.partner);
    unit.query_covariance[i] = static_cast<float>(own * s.own + other * s.other);
  });
  __syncthreads();
}

}  // namespace kv
