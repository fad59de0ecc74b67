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

/// Writes a target's key and value, adjusted sums given, by one warp: channels dealt over lanes.
template <class Player, class Head, class Plan>
__device__ void write_target(Player& player, Head& head, int target, int n, const FoldTarget& sum, Plan plan_of) {
  const Unit& unit = player.unit;
  const TraceData& trace = player.trace;
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr bool by_channel = declares_key_weight<typename Player::PolicyType>;
  // row = (own * row + sum of weight * victim) / divisor, `step` channels of a lane at a time
  const auto sums_by = [&]<int step>(std::integral_constant<int, step>, void* rows, int dim, auto weight_of) {
    const auto load = [&](int slot, int c, float(&x)[step]) {
      const long at = static_cast<long>(slot) * dim + c;
      if constexpr (step == 8)
        load_eight(rows, trace.elements, at, x);
      else
        x[0] = load_element(rows, trace.elements, at);
    };
    for (int c = step * lane; c < dim; c += step * 32) {
      float row[step], added[step] = {}, x[step];
      load(target, c, row);
      for (int i = 0; i < n; ++i) {
        int victim;
        const Fold& plan = plan_of(i, victim);
        load(victim, c, x);
#pragma unroll
        for (int k = 0; k < step; ++k) {
          const float weight = weight_of(plan, victim, c + k);
          if (weight != 0 || by_channel) added[k] += weight * x[k];
        }
      }
#pragma unroll
      for (int k = 0; k < step; ++k) {
        const float own = weight_of(sum, target, c + k), divisor = weight_of(sum, -1, c + k);
        if (!isfinite(divisor) || divisor == 0 || (by_channel && divisor < 0))
          player.fail(UnitError::bad_divisor, target);
        else
          store_element(rows, trace.elements, static_cast<long>(target) * dim + c + k,
                        round_as(trace.dtype, (own * row[k] + added[k]) / divisor));
      }
    }
  };
  const auto sums = [&](void* rows, int dim, auto weight_of) {
    if (!by_channel && in_eights(trace.elements, dim))
      sums_by(std::integral_constant<int, 8>{}, rows, dim, weight_of);
    else
      sums_by(std::integral_constant<int, 1>{}, rows, dim, weight_of);
  };
  bool key_moves = by_channel, value_moves = false, leaves = outside(sum.own_key / sum.key_divisor);
  for (int i = 0; i < n; ++i) {
    int victim;
    const Fold& plan = plan_of(i, victim);
    key_moves = key_moves || plan.key != 0, value_moves = value_moves || plan.value != 0;
    leaves = leaves || outside(plan.key / sum.key_divisor);
  }
  // Without weight from any victim a row is what it was, unless on_target scales it.
  key_moves = key_moves || sum.own_key != sum.key_divisor,
  value_moves = value_moves || sum.own_value != sum.value_divisor;
  if constexpr (by_channel) {
    struct ByChannel {
      Player& player;
      Head& head;
      int target, n;
      Plan plan_of;
      __device__ float operator()(const Fold&, int victim, int c) const { return weight(victim, c); }
      __device__ float operator()(const FoldTarget&, int slot, int c) const {
        if (slot >= 0) return weight(slot, c);
        float added = 0;
        for (int i = 0; i < n; ++i) {
          int victim;
          plan_of(i, victim);
          added += weight(victim, c);
        }
        return weight(target, c) + added;
      }
      __device__ float weight(int slot, int c) const { return player.policy.key_weight(head, slot, c); }
    };
    sums(unit.keys, trace.key_dim, ByChannel{player, head, target, n, plan_of});
  } else {
    struct Keys {
      __device__ float operator()(const Fold& plan, int, int) const { return plan.key; }
      __device__ float operator()(const FoldTarget& all, int slot, int) const {
        return slot >= 0 ? all.own_key : all.key_divisor;
      }
    };
    if (key_moves) sums(unit.keys, trace.key_dim, Keys{});
    if (key_moves && leaves && lane == 0) count(player.progress.weights_outside);
  }
  if (key_moves && lane == 0 && !player.absolute()) unit.rotated_at[target] = -1;
  if (!value_moves) return;
  struct Values {
    __device__ float operator()(const Fold& plan, int, int) const { return plan.value; }
    __device__ float operator()(const FoldTarget& all, int slot, int) const {
      return slot >= 0 ? all.own_value : all.value_divisor;
    }
  };
  sums(unit.values, trace.value_dim, Values{});
  const bool balanced = std::abs(sum.own_value + sum.value - sum.value_divisor) <= 1e-5f * std::abs(sum.value_divisor);
  if (lane == 0 && !balanced) count(player.progress.unbalanced);
}

}  // namespace detail

}  // namespace kv
