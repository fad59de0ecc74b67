// The rows that a merge writes: sums over a target's victims, rounded as they are stored.
#pragma once
#include <type_traits>

#include "kernels/play.cuh"
#include "kernels/quotients.cuh"
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

/// The sums of one target over its victims victim(0 .. n), not yet adjusted. `counts`: tokens as well, for on_target.
template <bool by_channel, bool counts, class Plan>
__device__ FoldTarget sum_of(const Play& play, int target, int n, Plan plan_of) {
  FoldTarget sum;
  if (counts) sum.multiplicity = play.unit.multiplicity[target];
  for (int i = 0; i < n; ++i) {
    int victim;
    const Fold& plan = plan_of(i, victim);
    if (i == 0) {
      sum.own_key = plan.own_key, sum.own_value = plan.own_value;
      sum.key_divisor = sum.own_key, sum.value_divisor = sum.own_value;
    }
    ++sum.victims;
    if (counts) sum.multiplicity += play.unit.multiplicity[victim];
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
  return !by_channel && (Player::of_plain_rows || (in_eights(player.elements(), trace.key_dim) &&
                                                   in_eights(player.elements(), trace.value_dim)));
}
template <bool by_channel, class Player>
__device__ int lanes_of_target(const Player& player) {
  const TraceData& trace = player.trace;
  return folds_in_eights<by_channel>(player) && trace.key_dim <= 128 && trace.value_dim <= 128 ? 16 : 32;
}

/// A slot's key and value as a lane has them, `step` channels of each, not widened yet. What is beyond a row's end is from its
/// beginning.
template <int step>
struct SlotRows {
  decltype(read_channels<step>(nullptr, Dtype::float32, 0)) key, value;
  __device__ static SlotRows of(const Unit& unit, const TraceData& trace, Dtype elements, int slot, int c) {
    const int dk = trace.key_dim, dv = trace.value_dim;
    return {read_channels<step>(unit.keys, elements, static_cast<long>(slot) * dk + (c < dk ? c : 0)),
            read_channels<step>(unit.values, elements, static_cast<long>(slot) * dv + (c < dv ? c : 0))};
  }
};

/// A victim under way to its target: its rows and their weights.
template <int step>
struct VictimRows {
  int slot;
  SlotRows<step> rows;
  float key, value;
};

/// What became of a target's rows. Without weight from any victim a row is what it was, unless on_target scales it.
struct RowsMoved {
  bool key = false, value = false, leaves = false;
};

/// `step` channels from c on of a target's key and value, adjusted sums given:
/// row = (own * row + sum of weight * victim) / divisor. `own` and the first victim have been read; the others are read here.
/// `bfloat16`: rows are known to be of it, stored and rounded.
template <int step, bool bfloat16, class Player, class Head, class Plan>
__device__ void write_channels(Player& player, Head& head, int target, int n, const FoldTarget& sum, Plan plan_of,
                               int c, const SlotRows<step>& own, VictimRows<step> next, RowsMoved& moved) {
  const Dtype elements = bfloat16 ? Dtype::bfloat16 : player.elements(), dtype = player.dtype();
  const Unit& unit = player.unit;
  const TraceData& trace = player.trace;
  const bool in_key = c < trace.key_dim, in_value = c < trace.value_dim;
  constexpr bool by_channel = declares_key_weight<typename Player::PolicyType>;
  const auto key_weight = [&](int slot, int channel) {
    if constexpr (by_channel) return player.policy.key_weight(head, slot, channel);
    return 0.f;
  };
  moved.key = moved.key || by_channel || sum.own_key != sum.key_divisor;
  moved.value = moved.value || sum.own_value != sum.value_divisor;
  moved.leaves = moved.leaves || outside(sum.own_key / sum.key_divisor);
  float key[step], value[step], keys[step] = {}, values[step] = {}, weights[step] = {}, x[step], y[step];
  for (int i = 0; i < n; ++i) {
    const VictimRows<step> mine = next;
    if (i + 1 < n) {
      const Fold& plan = plan_of(i + 1, next.slot);
      next.rows = SlotRows<step>::of(unit, trace, elements, next.slot, c), next.key = plan.key, next.value = plan.value;
    }
    widen_channels(elements, mine.rows.key, x), widen_channels(elements, mine.rows.value, y);
    moved.key = moved.key || mine.key != 0, moved.value = moved.value || mine.value != 0;
    moved.leaves = moved.leaves || outside(mine.key / sum.key_divisor);
#pragma unroll
    for (int k = 0; k < step; ++k) {
      const float weight = by_channel && in_key ? key_weight(mine.slot, c + k) : mine.key;
      if (in_key && (weight != 0 || by_channel)) keys[k] += weight * x[k];
      if (in_value && mine.value != 0) values[k] += mine.value * y[k];
      weights[k] += weight;
    }
  }
  const auto store = [&](void* rows, long at, float(&row)[step]) {
    if constexpr (!bfloat16)
#pragma unroll
      for (float& each : row) each = round_as(dtype, each);
    store_channels(rows, elements, at, row);
  };
  widen_channels(elements, own.key, key), widen_channels(elements, own.value, value);
  if (in_key && moved.key) {
    if constexpr (by_channel) {
#pragma unroll
      for (int k = 0; k < step; ++k) {
        const float own_weight = key_weight(target, c + k), divisor = own_weight + weights[k];
        if (!isfinite(divisor) || divisor <= 0)
          player.fail(UnitError::bad_divisor, target);
        else
          key[k] = (own_weight * key[k] + keys[k]) / divisor;
      }
    } else if (!isfinite(sum.key_divisor) || sum.key_divisor == 0) {
      player.fail(UnitError::bad_divisor, target);
    } else {
#pragma unroll
      for (int k = 0; k < step; ++k) key[k] = sum.own_key * key[k] + keys[k];
      Quotients(sum.key_divisor).divide(key);
    }
    store(unit.keys, static_cast<long>(target) * trace.key_dim + c, key);
  }
  if (in_value && moved.value) {
    if (!isfinite(sum.value_divisor) || sum.value_divisor == 0) {
      player.fail(UnitError::bad_divisor, target);
    } else {
#pragma unroll
      for (int k = 0; k < step; ++k) value[k] = sum.own_value * value[k] + values[k];
      Quotients(sum.value_divisor).divide(value);
    }
    store(unit.values, static_cast<long>(target) * trace.value_dim + c, value);
  }
}

/// What a target's rows leave in the books; by one thread.
template <class Player>
__device__ void book_rows(Player& player, int target, const FoldTarget& sum, const RowsMoved& moved) {
  constexpr bool by_channel = declares_key_weight<typename Player::PolicyType>;
  if (moved.key && !player.absolute()) player.unit.rotated_at[target] = -1;
  if (!by_channel && moved.key && moved.leaves) count(player.progress.weights_outside);
  const bool balanced = std::abs(sum.own_value + sum.value - sum.value_divisor) <= 1e-5f * std::abs(sum.value_divisor);
  if (moved.value && !balanced) count(player.progress.unbalanced);
}

/// Writes a target's key and value, `step` channels at a time by each of `lanes` neighbouring threads: whole warps or some of one.
/// sum_of_target() is asked for while rows are on their way.
template <int step, bool bfloat16 = false, class Player, class Head, class Sum, class Plan>
__device__ void write_rows(Player& player, Head& head, int target, int n, Sum sum_of_target, Plan plan_of, int lanes) {
  const TraceData& trace = player.trace;
  const Dtype elements = bfloat16 ? Dtype::bfloat16 : player.elements();
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  RowsMoved moved;
  FoldTarget sum;
  const int channels = max(trace.key_dim, trace.value_dim), beyond = step * (lane % 32);  // warps go together
  for (int c = step * lane; c - beyond < channels; c += step * lanes) {
    int victim;
    const Fold& plan = plan_of(0, victim);
    const auto rows_of = [&](int slot) { return SlotRows<step>::of(player.unit, trace, elements, slot, c); };
    const SlotRows<step> own = rows_of(target), first = rows_of(victim);  // before it is known whether they move
    if (lanes > 32) __syncwarp();                                         // or the compiler puts loads off
    if (c == step * lane) sum = sum_of_target();
    write_channels<step, bfloat16>(player, head, target, n, sum, plan_of, c, own, {victim, first, plan.key, plan.value},
                                   moved);
  }
  if (lane == 0) book_rows(player, target, sum, moved);
}

template <class Player, class Head, class Plan>
__device__ void write_target(Player& player, Head& head, int target, int n, const FoldTarget& known, Plan plan_of,
                             int lanes) {
  const auto sum = [&]() -> const FoldTarget& { return known; };
  constexpr bool by_channel = declares_key_weight<typename Player::PolicyType>;
  if constexpr (!by_channel)
    if (folds_in_eights<by_channel>(player)) {
      if (player.elements() == Dtype::bfloat16 && player.dtype() == Dtype::bfloat16)
        return write_rows<8, true>(player, head, target, n, sum, plan_of, lanes);
      return write_rows<8>(player, head, target, n, sum, plan_of, lanes);
    }
  write_rows<1>(player, head, target, n, sum, plan_of, lanes);
}

/// A target of many: its slot, how many victims join it, the number that its sums go by, where its list of victims begins and
/// the first of them.
struct TargetTurn {
  int slot, victims, number, begin, first;
};

/// Writes the rows of `count` targets, by groups of neighbouring lanes, each of which looks up one of its group's next targets:
/// turn_of(i). plan_at(list's begin, first victim) gives plan_of.
template <class Player, class Head, class TurnOf, class PlanAt>
__device__ void write_targets(Player& player, Head& head, int count, TurnOf turn_of, PlanAt plan_at) {
  constexpr bool by_channel = declares_key_weight<typename Player::PolicyType>;
  const Unit& unit = player.unit;
  const int lanes = lanes_of_target<by_channel>(player), groups = team_threads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const bool plain =  // the next target's rows are read while those of one are written
      lanes == 16 && player.elements() == Dtype::bfloat16 && player.dtype() == Dtype::bfloat16;
  for (int begin = 0; begin < count; begin += team_threads) {
    const TargetTurn mine = turn_of(min(begin + lane * groups + group, count - 1));
    const auto turn = [&](int j) {
      const int from = static_cast<int>(threadIdx.x % 32) - lane + min(j, lanes - 1);
      const auto of = [&](int x) { return __shfl_sync(~0u, x, from); };
      return TargetTurn{of(mine.slot), of(mine.victims), of(mine.number), of(mine.begin), of(mine.first)};
    };
    const auto is_there = [&](int j) { return begin + j * groups + group < count; };
    const int turns = min(lanes, (count - begin + groups - 1) / groups);
    if constexpr (!by_channel)
      if (plain) {
        struct Target {
          SlotRows<8> own;
          VictimRows<8> first;
          FoldTarget sum;
        };
        const auto read = [&](const TargetTurn& t) {
          const auto rows_of = [&](int slot) {
            return SlotRows<8>::of(unit, player.trace, Dtype::bfloat16, slot, 8 * lane);
          };
          const Fold& plan = unit.plans[t.first];
          return Target{rows_of(t.slot), {t.first, rows_of(t.first), plan.key, plan.value}, unit.targets[t.number]};
        };
        TargetTurn next = turn(0);
        Target coming = read(next);
#pragma unroll 1
        for (int j = 0; j < turns; ++j) {
          const TargetTurn now = next;
          const Target target = coming;
          next = turn(j + 1), coming = read(next);
          if (!is_there(j)) continue;
          RowsMoved moved;
          write_channels<8, true>(player, head, now.slot, now.victims, target.sum, plan_at(now.begin, now.first),
                                  8 * lane, target.own, target.first, moved);
          if (lane == 0) book_rows(player, now.slot, target.sum, moved);
        }
        continue;
      }
    for (int j = 0; j < turns; ++j) {
      const TargetTurn now = turn(j);
      if (is_there(j))
        write_target(player, head, now.slot, now.victims, unit.targets[now.number], plan_at(now.begin, now.first),
                     lanes);
    }
  }
  __syncthreads();
}

}  // namespace detail

}  // namespace kv
