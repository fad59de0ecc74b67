// Applying merges by a thread block: core/fold.cpp and the merging half of core/head_compress.cpp. Every plan is made from
// the rows as they were; every sum is added in token order of the victims, by one owner.
#pragma once
#include "kernels/fold_rows.cuh"

namespace kv {

/// What merge: false on links leaves: the counts as if the right slots had joined. Needs and gives a barrier.
__device__ __noinline__ inline void count_as_if_merged(const Play& play, int clip) {
  const Unit& unit = play.unit;
  play.team.for_each(play.size, [&](int i) {
    const int slot = unit.order[i];
    if (!unit.stays[slot]) return;
    const auto joins = [&](int place) {
      return place >= 0 && place < play.size && !unit.stays[unit.order[place]] &&
             unit.target[unit.order[place]] == slot;
    };
    int tokens = unit.multiplicity[slot];
    for (int j = i + 1; joins(j); ++j) tokens += unit.multiplicity[unit.order[j]];
    for (int j = i - 1; joins(j); --j)
      tokens += unit.multiplicity[unit.order[j]];  // a run that settled at a later pivot
    unit.multiplicity[slot] = tokens;
    detail::clip_count(play, slot, clip);
  });
  __syncthreads();
}

/// What a fold leaves in the books; by one thread.
template <class Player>
__device__ void book_fold(Player& player, const Fold& plan, int victim) {
  // All is read before the first store, after which the compiler would have to read it anew.
  const Unit& unit = player.unit;
  const int target = plan.target, clip = player.traits().clip;
  int *const tokens_of = unit.multiplicity + target, *const parent = unit.parent + unit.token[victim];
  const int adopter = unit.token[target], tokens = *tokens_of + unit.multiplicity[victim];
  *tokens_of = tokens, *parent = adopter;
  if constexpr (detail::declares_on_fold<typename Player::PolicyType>)
    player.policy.on_fold(player.state(target), player.state(victim), plan);
  if (clip > 0) detail::clip_count(player, target, clip);
  detail::keep_note(player, plan);
  ++player.progress.merges;
  player.progress.lost = 1;
}

/// Whether a victim of this policy can leave the books while its target's rows are written: no hook looks at them then.
template <class P>
constexpr bool leaves_in_fold =
    !detail::declares_key_weight<P> && !detail::declares_on_target<P> && !detail::declares_on_evict<P>;

/// Folds one victim into its target or targets; a policy that folds one at a time may fold into slots that go later. The
/// clerk plans and keeps the books; one target's channels are dealt over all threads, many targets over all warps. Needs and
/// gives a barrier, but for the clerk's books. Returns the target, -1 when there is none, `many_targets` when there are several.
/// `gap`: the victim's rank, where leaves_in_fold and it leaves the books as well, which then are closed behind one target's
/// barrier, else ask for one; or -1.
constexpr int many_targets = -2;
template <class Player, class Head>
__device__ __forceinline__ int fold_one(Player& player, Head& head, int victim, int gap) {
  using P = typename Player::PolicyType;
  constexpr bool by_channel = detail::declares_key_weight<P>, adjusts = detail::declares_on_target<P>;
  const int thread = static_cast<int>(threadIdx.x);
  const Unit& unit = player.unit;
  Fold& plan = player.fixed.plan;
  const bool any_slot = player.traits().one_at_a_time;
  const auto only = [&](int, int& v) -> const Fold& {
    v = victim;
    return plan;
  };
  const auto sum_at = [&](int slot) {
    FoldTarget sum = detail::sum_of<by_channel, adjusts>(player, slot, 1, only);
    if constexpr (adjusts) player.policy.on_target(head, slot, sum);
    return sum;
  };
  if (player.is_clerk()) {
    plan = player.policy.on_merge(head, victim);
    if (!detail::plan_can_be(player, plan, victim)) plan.target = -1;
    if (plan.target >= 0 && !any_slot && !unit.stays[plan.target]) {
      player.progress.lost_in_folds += unit.multiplicity[victim];
      plan.target = -1;
    }
    if (plan.target < 0) ++player.progress.evictions;
  }
  __syncthreads();
  const int target = plan.target, spread = plan.spread;
  const bool leaves = leaves_in_fold<P> && gap >= 0;
  const auto leave = [&](bool adopted) {
    if (!leaves) return;
    player.close_gap(victim, gap, thread, team_threads);
    if (player.is_clerk()) player.book_removal(victim, adopted);
  };
  if (target < 0) {
    leave(false);
    return -1;
  }
  if (spread == 1 && leaves) {
    constexpr int writers = 32 * stream_warps, clerks = writers + 32;
    if (thread < writers) {
      detail::write_rows<1>(
          player, head, target, 1, [&] { return sum_at(target); }, only, writers);
      if constexpr (copies_boxes) written_to_device();
    } else if (thread >= clerks) {
      player.close_gap(victim, gap, thread - clerks, team_threads - clerks);
    } else if (player.is_clerk()) {
      book_fold(player, plan, victim);
      player.book_removal(victim, true);
    }
    __syncthreads();
    return target;
  }
  // In steps where victims leave, only a compression of many that happens to fold one comes here: that may go the long way.
  if constexpr (!(leaves_in_fold<P> && Player::of_plain_rows))
    if (spread == 1) {
      detail::write_rows<1>(
          player, head, target, 1, [&] { return sum_at(target); }, only, team_threads);
      __syncthreads();
      if (player.is_clerk()) book_fold(player, plan, victim);
      return target;
    }
  const auto each_target = [&](auto f) {  // f(i, slot) of every slot that receives, by the warp that owns it
    int left = spread, i = 0;
    for (int place = unit.rank[target]; left > 0 && place < player.size; ++place) {
      const int slot = unit.order[place];
      if ((!any_slot && !unit.stays[slot]) || slot == victim) continue;
      --left;
      if (i % team_warps == thread / 32) f(i, slot);
      ++i;
    }
  };
  each_target([&](int i, int slot) {
    const FoldTarget sum = sum_at(slot);
    if (thread % 32 == 0) unit.targets[i] = sum;
  });
  __syncthreads();
  each_target([&](int i, int slot) { detail::write_target(player, head, slot, 1, unit.targets[i], only, 32); });
  __syncthreads();
  if (player.is_clerk()) book_fold(player, plan, victim);
  __syncthreads();
  leave(true);
  return many_targets;
}

/// The part of fold_many that fills the lists of targets [from, to) (by number among those that stay), writes their rows and
/// carries state over. start[k] is where k's list begins, `base` of them elsewhere; afterwards where it ends.
template <class Player, class Head>
__device__ void fold_range(Player& player, Head& head, const int* going, int gone, int from, int to, int base) {
  using P = typename Player::PolicyType;
  constexpr bool by_channel = detail::declares_key_weight<P>, adjusts = detail::declares_on_target<P>;
  const Unit& unit = player.unit;
  const BlockTeam team = player.team;
  const int *kept_place = unit.work[1], *kept_slot = unit.work[2];
  int *start = unit.work[3], *list = unit.list;
  const auto first_of = [&](const Fold& plan) { return max(from, kept_place[plan.target]); };
  const auto end_of = [&](const Fold& plan) { return min(to, kept_place[plan.target] + plan.spread); };
  int *const begins = team.memory->counts, *const ends = reinterpret_cast<int*>(team.memory->partial);
  for (int first = 0; first < gone; first += team_threads) {  // in token order: by rounds of the team
    const int i = first + static_cast<int>(threadIdx.x);
    int begin = 0, end = 0;  // of my victim's targets
    if (i < gone)
      if (const Fold& plan = unit.plans[going[i]]; plan.target >= 0) begin = first_of(plan), end = end_of(plan);
    begins[threadIdx.x] = begin, ends[threadIdx.x] = end;
    __syncthreads();
    for (int k = begin; k < end; ++k) {
      int earlier = 0;  // victims of this round before mine that share the target
      const auto add = [&](unsigned j, int from, int to) { earlier += j < threadIdx.x && from <= k && k < to; };
#pragma unroll 2
      for (unsigned j = 0; j < threadIdx.x; j += 4) {
        const int4 from = *reinterpret_cast<const int4*>(begins + j), to = *reinterpret_cast<const int4*>(ends + j);
        add(j, from.x, to.x), add(j + 1, from.y, to.y), add(j + 2, from.z, to.z), add(j + 3, from.w, to.w);
      }
      list[start[k] - base + earlier] = going[i];
    }
    __syncthreads();
    for (int k = begin; k < end; ++k) atomicAdd(&start[k], 1);
    __syncthreads();
  }
  const auto members = [&](int k, int& begin) {
    begin = (k > 0 ? start[k - 1] : 0) - base;
    return start[k] - base - begin;
  };
  const auto plan_at = [&](int begin, int first) {  // first: the first of the victims
    return [&unit, list, begin, first](int i, int& victim) -> const Fold& {
      victim = i == 0 ? first : list[begin + i];
      return unit.plans[victim];
    };
  };
  int* receiving = unit.work[4];  // the targets that have victims
  int begin;
  const int receivers = team.number(
      to - from, [&](int i) { return members(from + i, begin) > 0; },
      [&](int i, bool receives, int before) {
        if (receives) receiving[before] = from + i;
      });
  __syncthreads();
  team.for_each(receivers, [&](int i) {
    const int k = receiving[i], size = members(k, begin);
    FoldTarget sum = detail::sum_of<by_channel, adjusts>(player, kept_slot[k], size, plan_at(begin, list[begin]));
    if constexpr (adjusts) player.policy.on_target(head, kept_slot[k], sum);
    unit.targets[k] = sum;
  });
  __syncthreads();
  const auto turn_of = [&](int i) {
    const int k = receiving[i], victims = members(k, begin);
    return detail::TargetTurn{kept_slot[k], victims, k, begin, list[begin]};
  };
  detail::write_targets(player, head, receivers, turn_of, plan_at);
  team.for_each(receivers, [&](int i) {
    const int k = receiving[i], size = members(k, begin), target = kept_slot[k];
    for (int j = 0; j < size; ++j) {
      const int victim = list[begin + j];
      const Fold& plan = unit.plans[victim];
      if (plan.target != target) continue;  // one of several that it is spread over
      unit.multiplicity[target] += unit.multiplicity[victim];
      unit.parent[unit.token[victim]] = unit.token[target];
      if constexpr (detail::declares_on_fold<typename Player::PolicyType>)
        player.policy.on_fold(player.state(target), player.state(victim), plan);
    }
    detail::clip_count(player, target, player.traits().clip);
  });
  __syncthreads();
}

/// Folds many victims at once. Needs and gives a barrier.
template <class Player, class Head>
__device__ __noinline__ void fold_many(Player& player, Head& head, const int* going, int gone) {
  const Unit& unit = player.unit;
  const BlockTeam team = player.team;
  const int n = player.size;
  if (gone == 0) return;
  int *kept_place = unit.work[1], *kept_slot = unit.work[2];  // by slot: its number among those that stay; and back
  const int kept = team.number(
      n, [&](int i) { return player.place(i, true); },
      [&](int, const Play::Place& stays, int before) {
        kept_place[stays.slot] = before;
        if (stays) kept_slot[before] = stays.slot;
      });
  __syncthreads();
  int joined = 0;
  team.for_each(gone, [&](int i) {
    const int victim = going[i];
    Fold plan = player.policy.on_merge(head, victim);
    if (!detail::plan_can_be(player, plan, victim)) plan.target = -1;
    if (plan.target >= 0 && !unit.stays[plan.target]) {
      detail::count(player.progress.lost_in_folds, unit.multiplicity[victim]);
      plan.target = -1;
    }
    unit.plans[victim] = plan;
    if (plan.target < 0)
      detail::count(player.progress.evictions);
    else
      detail::keep_note(player, plan), ++joined;
  });
  int before;
  joined = team.scan(joined, before);
  if (joined == 0) return;
  const auto first_of = [&](const Fold& plan) { return kept_place[plan.target]; };
  const auto end_of = [&](const Fold& plan) { return min(kept, kept_place[plan.target] + plan.spread); };
  // The victims of every target: counted, and their lists laid one behind the other.
  int* start = unit.work[3];
  team.for_each(kept + 1, [&](int k) { start[k] = 0; });
  __syncthreads();
  const auto each = [&](int i, auto f) {
    if (i >= gone) return;
    const Fold& plan = unit.plans[going[i]];
    if (plan.target < 0) return;
    for (int k = first_of(plan); k < end_of(plan); ++k) f(k);
  };
  team.for_each(gone, [&](int i) { each(i, [&](int k) { atomicAdd(&start[k], 1); }); });
  __syncthreads();
  const int total = team.add_before(
      kept, [&](int k) { return start[k]; }, [&](int k, int, int before) { start[k] = before; });
  if (threadIdx.x == 0) start[kept] = total;
  __syncthreads();
  // As many targets at a time as the list has room for: all of them, unless victims are spread over many.
  for (int from = 0; from < kept;) {
    const int base = from > 0 ? start[from - 1] : 0;  // lists of earlier targets have moved on to their ends
    int to = from + 1, above = kept + 1;
    while (to + 1 < above) {
      const int middle = (to + above) / 2;
      (start[middle] - base <= unit.list_size ? to : above) = middle;
    }
    __syncthreads();
    fold_range(player, head, going, gone, from, to, base);
    from = to;
  }
  if (threadIdx.x == 0) player.progress.merges += joined, player.progress.lost = 1;
  player.ring.running = false;
  __syncthreads();
}

}  // namespace kv
