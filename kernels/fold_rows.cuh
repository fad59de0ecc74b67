// The rows that a merge writes: sums over a target's victims, rounded as they are stored.
#pragma once
#include <type_traits>

#include "kernels/play.cuh"
#include "policies/policy.hpp"

namespace kv {

namespace detail {

__device__ inline bool outside(float weight) { return !(weight >= -1e-6f && weight <= 1 + 1e-6f); }

/// Cuts a slot's count to `clip` tokens; by one thread.
__device__ inline void clip_count(const Play& play, int slot, int clip) {
  const int beyond = play.unit.multiplicity[slot] - clip;
  if (clip == 0 || beyond <= 0) return;
  play.unit.multiplicity[slot] = clip;
  atomicAdd(reinterpret_cast<unsigned long long*>(&play.progress.lost_by_clip),
            static_cast<unsigned long long>(beyond));
}

__device__ inline void count(long long& counter, long long n = 1) {
  atomicAdd(reinterpret_cast<unsigned long long*>(&counter), static_cast<unsigned long long>(n));
}

/// Whether a plan can be; records the first that cannot.
__device__ inline bool plan_can_be(const Play& play, const Fold& plan, int victim) {
  if (plan.target < 0) return true;
  const bool weighted = isfinite(plan.key) && isfinite(plan.value) && isfinite(plan.own_key) &&
                        isfinite(plan.own_value) && isfinite(plan.extra) && plan.spread >= 1;
  if (plan.target != victim && plan.target < play.size && weighted) return true;
  if (play.fail(UnitError::bad_plan, victim, plan.target, play.size)) {
    play.progress.error_weights[0] = plan.key, play.progress.error_weights[1] = plan.own_key;
    play.progress.error_weights[2] = plan.value, play.progress.error_weights[3] = plan.own_value;
  }
  return false;
}

__device__ inline void keep_note(const Play& play, const Fold& plan) {
  if (!isfinite(plan.note)) return;
  const int at = atomicAdd(&play.progress.notes, 1);
  if (at < play.trace.tokens) play.unit.notes[at] = plan.note;
}

/// The sums of one target over its victims victim(0 .. n), not yet adjusted.
template <bool by_channel, class Plan>
__device__ FoldTarget sum_of(const Play& play, int target, int n, Plan plan_of) {
  FoldTarget sum;
  sum.multiplicity = play.unit.multiplicity[target];
  for (int i = 0; i < n; ++i) {
    int victim;
    const Fold& plan = plan_of(i, victim);
    if (i == 0) {
      sum.own_key = plan.own_key, sum.own_value = plan.own_value;
      sum.key_divisor = sum.own_key, sum.value_divisor = sum.own_value;
    }
    ++sum.victims;
    sum.multiplicity += play.unit.multiplicity[victim];
    sum.extra += plan.extra;
    sum.value += plan.value, sum.value_divisor += plan.value;
    if (!by_channel) sum.key += plan.key, sum.key_divisor += plan.key;
  }
  return sum;
}

/// Whether the rows of a target can be written eight channels at a time; and how many neighbouring lanes write one.
template <bool by_channel, class Player>
__device__ bool folds_in_eights(const Player& player) {
  const TraceData& trace = player.trace;
  return !by_channel && in_eights(player.elements(), trace.key_dim) && in_eights(player.elements(), trace.value_dim);
}
template <bool by_channel, class Player>
__device__ int lanes_of_target(const Player& player) {
  const TraceData& trace = player.trace;
  return folds_in_eights<by_channel>(player) && trace.key_dim <= 128 && trace.value_dim <= 128 ? 16 : 32;
}

/// Writes a target's key and value, adjusted sums given, `step` channels at a time by each of `lanes` neighbouring threads:
/// row = (own * row + sum of weight * victim) / divisor. Rows are read together, before it is known whether they move.
/// `bfloat16`: they are known to be of it, stored and rounded.
template <int step, bool bfloat16 = false, class Player, class Head, class Plan>
__device__ void write_rows(Player& player, Head& head, int target, int n, const FoldTarget& sum, Plan plan_of,
                           int lanes) {
  const Dtype elements = bfloat16 ? Dtype::bfloat16 : player.elements(),
              dtype = bfloat16 ? Dtype::bfloat16 : player.dtype();
  const Unit& unit = player.unit;
  const TraceData& trace = player.trace;
  const int lane = static_cast<int>(threadIdx.x) % lanes, dk = trace.key_dim, dv = trace.value_dim;
  constexpr bool by_channel = declares_key_weight<typename Player::PolicyType>;
  const auto key_weight = [&](int slot, int c) {
    if constexpr (by_channel) return player.policy.key_weight(head, slot, c);
    return 0.f;
  };
  const auto store = [&](void* rows, long at, float(&row)[step], const float(&added)[step], auto own_of,
                         auto divisor_of) {
#pragma unroll
    for (int k = 0; k < step; ++k) {
      const float divisor = divisor_of(k);
      if (!isfinite(divisor) || divisor == 0 || (by_channel && divisor < 0))
        player.fail(UnitError::bad_divisor, target);
      else
        row[k] = round_as(dtype, (own_of(k) * row[k] + added[k]) / divisor);
    }
    store_channels(rows, elements, at, row);
  };
  // Without weight from any victim a row is what it was, unless on_target scales it.
  bool key_moves = by_channel, value_moves = false, leaves = false;
  for (int c = step * lane; c < max(dk, dv); c += step * lanes) {
    const bool in_key = c < dk, in_value = c < dv;
    struct Rows {
      decltype(read_channels<step>(nullptr, elements, 0)) key, value;
    };
    const auto read = [&](int slot) {  // what is beyond a row's end, from its beginning
      return Rows{read_channels<step>(unit.keys, elements, static_cast<long>(slot) * dk + (in_key ? c : 0)),
                  read_channels<step>(unit.values, elements, static_cast<long>(slot) * dv + (in_value ? c : 0))};
    };
    int victim;
    plan_of(0, victim);
    const Rows own = read(target);
    Rows next = read(victim);
    key_moves = key_moves || sum.own_key != sum.key_divisor,
    value_moves = value_moves || sum.own_value != sum.value_divisor;
    leaves = leaves || outside(sum.own_key / sum.key_divisor);
    float key[step], value[step], keys[step] = {}, values[step] = {}, weights[step] = {}, x[step], y[step];
    for (int i = 0; i < n; ++i) {
      const Rows mine = next;
      const Fold& plan = plan_of(i, victim);
      if (int after; i + 1 < n) plan_of(i + 1, after), next = read(after);
      widen_channels(elements, mine.key, x), widen_channels(elements, mine.value, y);
      key_moves = key_moves || plan.key != 0, value_moves = value_moves || plan.value != 0;
      leaves = leaves || outside(plan.key / sum.key_divisor);
#pragma unroll
      for (int k = 0; k < step; ++k) {
        const float weight = by_channel && in_key ? key_weight(victim, c + k) : plan.key;
        if (in_key && (weight != 0 || by_channel)) keys[k] += weight * x[k];
        if (in_value && plan.value != 0) values[k] += plan.value * y[k];
        weights[k] += weight;
      }
    }
    widen_channels(elements, own.key, key), widen_channels(elements, own.value, value);
    if (in_key && key_moves)
      store(
          unit.keys, static_cast<long>(target) * dk + c, key, keys,
          [&](int k) { return by_channel ? key_weight(target, c + k) : sum.own_key; },
          [&](int k) { return by_channel ? key_weight(target, c + k) + weights[k] : sum.key_divisor; });
    if (in_value && value_moves)
      store(
          unit.values, static_cast<long>(target) * dv + c, value, values, [&](int) { return sum.own_value; },
          [&](int) { return sum.value_divisor; });
  }
  if (lane != 0) return;
  if (key_moves && !player.absolute()) unit.rotated_at[target] = -1;
  if (!by_channel && key_moves && leaves) count(player.progress.weights_outside);
  const bool balanced = std::abs(sum.own_value + sum.value - sum.value_divisor) <= 1e-5f * std::abs(sum.value_divisor);
  if (value_moves && !balanced) count(player.progress.unbalanced);
}

template <class Player, class Head, class Plan>
__device__ void write_target(Player& player, Head& head, int target, int n, const FoldTarget& sum, Plan plan_of,
                             int lanes) {
  constexpr bool by_channel = declares_key_weight<typename Player::PolicyType>;
  if constexpr (!by_channel)
    if (folds_in_eights<by_channel>(player)) {
      if (player.elements() == Dtype::bfloat16 && player.dtype() == Dtype::bfloat16)
        return write_rows<8, true>(player, head, target, n, sum, plan_of, lanes);
      return write_rows<8>(player, head, target, n, sum, plan_of, lanes);
    }
  write_rows<1>(player, head, target, n, sum, plan_of, lanes);
}

}  // namespace detail

}  // namespace kv
