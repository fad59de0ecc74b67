// Which slots stay: core/select.cpp's rule by a thread block. Everything is by place (token order) until stays[slot].
#pragma once
#include <climits>

#include "kernels/play.cuh"
#include "policies/policy.hpp"

namespace kv {

/// core/select.hpp's Safety as bytes.
enum : std::uint8_t { safety_normal, safety_protected, safety_sink };

__device__ inline std::uint8_t safety_of(const Protect& protect, int now, float score, int token) {
  // Without branches: whoever scores a step's slots waits for the last of them.
  const bool sink = (score == INFINITY) | (token < protect.sinks);
  const bool safe = (score == kv::protect) | (now - token < protect.recent);
  return sink ? safety_sink : safe ? safety_protected : safety_normal;
}

__device__ __noinline__ inline float report_nan(Fixed& fixed, int slot, int token) {
  record_error(fixed.progress, UnitError::nan_score, slot, token);
  return 0;
}
/// A score that can be compared: NaN is the unit's error, and 0 from then on, so that every selection comes to an end.
__device__ inline float checked_score(Fixed& fixed, float score, int slot, int token) {
  return isnan(score) ? report_nan(fixed, slot, token) : score;
}

/// One head's candidates, or those of all heads of a layer together.
struct DeviceCandidates {
  const float* score;
  const std::uint8_t* safety;
};

/// Writes score_at and safety_at of one buffer from unit.score; a link is as safe as the safer of its slots. Gives a
/// barrier.
__device__ __noinline__ inline void classify(Fixed& fixed, int size, int now, bool links, int buffer) {
  const Unit& unit = fixed.unit;
  const int *const order = unit.order, *const rank = unit.rank, *const tokens = unit.token;
  const float* const scores = unit.score;
  float* const score_at = unit.score_at[buffer];
  std::uint8_t* const safety_at = unit.safety_at[buffer];
  const Protect protect = unit.protect;
  struct Candidate {
    int place, token, next_token;
    float score;
  };
  BlockTeam{&fixed.team}.for_each_read<8>(
      size,
      [&](int s) {
        const int place = rank[s];
        return Candidate{place, tokens[s], links && place + 1 < size ? tokens[order[place + 1]] : INT_MIN / 2,
                         scores[s]};
      },
      [&](int s, const Candidate& c) {
        const float score = checked_score(fixed, c.score, s, c.token);
        std::uint8_t safety = safety_of(protect, now, score, c.token);
        if (safety == safety_normal && now - c.next_token < protect.recent) safety = safety_protected;
        safety_at[c.place] = safety;
        score_at[c.place] = safety == safety_normal ? score : 0;  // sums over heads stay finite
      });
  __syncthreads();
}

/// f(slot, score) for every slot that no head of the layer holds safe: unit.score_at of one buffer, NaN where safe, added up
/// over the heads in order. Twice four neighbouring slots a thread, whose loads go out together.
template <class F>
__device__ void each_sum_over_heads(const Fixed& fixed, int buffer, int size, F f) {
  // Units have one layout, one behind the other.
  const Unit* mates = fixed.units + fixed.unit.first_head;
  const float* first = mates[0].score_at[buffer];
  const long apart = fixed.unit.layer_heads > 1 ? mates[1].score_at[buffer] - first : 0;
  constexpr int groups = 2, step = 4 * team_threads;
  for (int s = 4 * static_cast<int>(threadIdx.x); s < size; s += groups * step) {
    float sum[groups][4] = {};
#pragma unroll 8
    for (int h = 0; h < fixed.unit.layer_heads; ++h)
#pragma unroll
      for (int k = 0; k < groups; ++k) {
        if (s + k * step >= size) continue;
        const float4 theirs = __ldcg(reinterpret_cast<const float4*>(first + h * apart + s + k * step));
        const float each[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[k][i] = h == 0 ? each[i] : sum[k][i] + each[i];
      }
#pragma unroll
    for (int k = 0; k < groups; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (s + k * step + i < size && !isnan(sum[k][i])) f(s + k * step + i, sum[k][i]);
  }
}

/// The candidates that decide: the unit's own, or the sums over its layer's heads, whose arrays must be complete. Gives a
/// barrier.
__device__ __noinline__ inline DeviceCandidates decisive(const Play& play, bool together, int buffer) {
  const Unit& unit = play.unit;
  if (!together || unit.layer_heads == 1) return {unit.score_at[buffer], unit.safety_at[buffer]};
  const Unit* mates = play.fixed.units + unit.first_head;  // of one layout, one behind the other
  const float* scores = mates[0].score_at[buffer];
  const std::uint8_t* safeties = mates[0].safety_at[buffer];
  const long scores_apart = mates[1].score_at[buffer] - scores, safeties_apart = mates[1].safety_at[buffer] - safeties;
  struct Sum {
    float score;
    std::uint8_t safety;
  };
  const auto first = [&](int i) { return Sum{__ldcg(scores + i), __ldcg(safeties + i)}; };
  const auto next = [&](int i, int before) {
    const int h = before + 1;
    return Sum{__ldcg(scores + h * scores_apart + i), __ldcg(safeties + h * safeties_apart + i)};
  };
  const auto add = [](Sum& sum, const Sum& theirs) {  // scores add up, the higher safety wins
    sum.score += theirs.score, sum.safety = theirs.safety > sum.safety ? theirs.safety : sum.safety;
  };
  play.team.for_each_read(play.size, first, unit.layer_heads - 1, next, add, [&](int i, const Sum& sum) {
    unit.all_score[i] = sum.score, unit.all_safety[i] = sum.safety;
  });
  __syncthreads();
  return {unit.all_score, unit.all_safety};
}

/// Of candidates that do not take part; no score has it, being NaN's.
constexpr unsigned no_key = ~0u;

/// The k-th smallest key_of(i) of i < n (k from 1), how many of that key are among the k, and how many there are: a radix
/// selection, 8 bits at a time. keys[i] = key_of(i) is left behind. Gives a barrier.
struct Threshold {
  unsigned key;
  int in, all;
};
template <class Key>
__device__ Threshold kth_smallest(BlockTeam team, int n, int k, Key key_of, unsigned* keys) {
  const uint32_t counts = shared_address(team.memory->counts);
  Threshold threshold{0, k, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    team.for_each(256, [&](int i) { team.memory->counts[i] = 0; });
    __syncthreads();
    const unsigned mask = shift == 24 ? 0u : ~0u << (shift + 8);
    const auto count_in = [&](unsigned key) {
      count_one(counts + 4 * (key >> shift & 255u), (key & mask) == threshold.key);
    };
    if (shift == 24)
      team.for_each_read<16>((n + 3) / 4 * 4,
                             [&](int i) {
                               const unsigned key = key_of(min(i, n - 1));
                               return i < n ? key : no_key;
                             },
                             [&](int i, unsigned key) { keys[i] = key, count_in(key); });
    else
      team.for_each_read<8>(
          (n + 3) / 4, [&](int i) { return reinterpret_cast<const uint4*>(keys)[i]; },
          [&](int, const uint4& four) { count_in(four.x), count_in(four.y), count_in(four.z), count_in(four.w); });
    __syncthreads();
    int before;
    const int mine = team.memory->counts[threadIdx.x];
    team.scan(mine, before);
    if (before < threshold.in && before + mine >= threshold.in) {
      team.memory->flag = static_cast<int>(threadIdx.x);
      team.memory->number = threshold.in - before;
    }
    __syncthreads();
    threshold.key |= static_cast<unsigned>(team.memory->flag) << shift;
    threshold.in = team.memory->number, threshold.all = team.memory->counts[team.memory->flag];
    __syncthreads();
  }
  return threshold;
}

/// mark(where(place), whether it is one of the k candidates of the lowest scores among those that take part) for every place;
/// `older_first`: of equals the older, else the newer. False, and nothing is marked, if fewer take part. Gives a barrier.
template <class Takes, class Where, class Mark>
__device__ bool mark_lowest(const Play& play, const DeviceCandidates& c, int n, int k, bool older_first, Takes takes,
                            Where where, Mark mark) {
  auto* const keys = reinterpret_cast<unsigned*>(play.unit.work[4]);
  const auto key_of = [&](int i) {
    const unsigned key = Cut::key_of(c.score[i]);
    return takes(i) ? key : no_key;
  };
  const Threshold threshold = kth_smallest(play.team, n, k, key_of, keys);
  if (threshold.key == no_key) return false;
  struct Place {
    int at;
    unsigned key, limit;
    __device__ explicit operator bool() const { return key == limit; }
  };
  play.team.number<16>(
      n,
      [&](int i) {
        return Place{where(i), keys[i], threshold.key};
      },
      [&](int, const Place& place, int before) {
        const bool first = older_first ? before < threshold.in : before >= threshold.all - threshold.in;
        mark(place.at, place ? first : place.key < place.limit);
      });
  __syncthreads();
  return true;
}

/// From places to slots: stays[slot], and how many go. Gives a barrier.
__device__ __noinline__ inline int mark_slots(const Play& play, const int* goes) {
  const int* const order = play.unit.order;
  std::uint8_t* const stays = play.unit.stays;
  const int gone = play.team.number(
      play.size,
      [&](int i) {
        return Play::Place{order[i], goes[i] != 0};
      },
      [&](int, const Play::Place& mine, int) { stays[mine.slot] = !mine.is; });
  __syncthreads();
  return gone;
}

/// core/select.cpp's select: stays[slot], and how many go. `goes` is [n]. Gives a barrier.
__device__ __noinline__ inline int select_slots(const Play& play, const DeviceCandidates& c, int* goes) {
  const BlockTeam team = play.team;
  const int n = play.size, budget = play.budget;
  const int* const order = play.unit.order;
  std::uint8_t* const stays = play.unit.stays;
  const auto is_normal = [&](int i) { return c.safety[i] == safety_normal; };
  const auto slot_at = [&](int i) { return order[i]; };
  const auto leave = [&](int slot, bool leaves) { stays[slot] = !leaves; };
  if (n > budget && mark_lowest(play, c, n, n - budget, false, is_normal, slot_at, leave)) return n - budget;
  // More is safe than stays: the first sinks, leaving one slot for another; then the newest of what is protected.
  const int sinks = team.number(
      n, [&](int i) { return c.safety[i] == safety_sink; },
      [&](int i, bool is_sink, int before) { goes[i] = n > budget && !(is_sink && before < budget - 1); });
  __syncthreads();
  const int left = budget - min(sinks, budget - 1);
  const auto waits = [&](int i) { return c.safety[n - 1 - i] != safety_normal && goes[n - 1 - i] != 0; };
  int found = 0;
  for (int first = 0; first < n && found < left; first += team_threads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const bool mine = i < n && waits(i);
    int before;
    const int here = team.scan(mine, before);
    if (mine && found + before < left) goes[n - 1 - i] = 0;
    found += here;
  }
  __syncthreads();
  return mark_slots(play, goes);
}

/// core/select.cpp's select_links: goes[place + 1] = 1 for every link (place, place + 1) that is joined. `state` is [n].
/// Gives a barrier. Inlined, where a policy's traits are known and leave little of it.
__device__ __forceinline__ void select_links(const Play& play, const DeviceCandidates& c, const Traits& traits,
                                             int* goes, int* state) {
  const BlockTeam team = play.team;
  const int n = play.size, budget = play.budget, links = n - 1;
  const bool by_limit = !traits.needs_budget();
  const auto safety = [&](int i) -> std::uint8_t {
    const bool fits = i < budget - 1;
    return c.safety[i] == safety_sink && !fits ? safety_protected : c.safety[i];
  };
  team.for_each(n, [&](int i) { goes[i] = 0; });
  __syncthreads();
  const int normal = team.count(links, [&](int i) { return safety(i) == safety_normal; });
  const auto is_normal = [&](int i) { return safety(i) == safety_normal; };
  const auto is_safe = [&](int i) { return safety(i) == safety_protected; };
  int left = by_limit ? n : n - budget;
  if (left <= 0 || links <= 0) return;
  const auto mark = [&](auto takes, int k, bool scored) {  // links by place; goes is by the right slot
    const auto join = [&](int i, bool joins) {
      if (joins) goes[i + 1] = 1;
    };
    if (k <= 0) return;
    if (scored)
      mark_lowest(
          play, c, links, k, true, takes, [](int i) { return i; }, join);
    else
      team.number(links, takes, [&](int i, bool taken, int before) { join(i, taken && before < k); });
    __syncthreads();
  };
  if (traits.picks != Picks::disjoint) {
    const auto low = [&](int i) { return is_normal(i) & (!by_limit | (c.score[i] < traits.every_link_below)); };
    const int lowest = by_limit ? team.count(links, low) : min(left, normal);
    mark(low, lowest, true);
    if (!by_limit && left > lowest) mark(is_safe, left - lowest, false);
    return;
  }
  // Disjoint: greedily from the lowest. A link is in when it is the lowest of what is undecided around it, and then its
  // neighbours are out; in the end the lowest `left` of those that are in are taken. Only links of one safety a round.
  const bool scored = normal > 0;
  const auto takes = [&](int i) {
    return (scored ? is_normal(i) : is_safe(i)) && (!by_limit || (scored && c.score[i] < traits.every_link_below));
  };
  constexpr int undecided = 0, in = 1, out = 2;
  team.for_each(n, [&](int i) { state[i] = i < links && takes(i) ? undecided : out; });
  __syncthreads();
  const auto below = [&](int i, int j) {  // whether link i is picked before its neighbour j
    const float a = c.score[i], b = c.score[j];
    return scored ? a < b || (a == b && i < j) : i < j;
  };
  for (bool more = true; more;) {
    team.for_each_read<8>(
        links,
        [&](int i) {
          const int left = max(i - 1, 0), right = i + 1;
          const bool waits = state[i] == undecided, left_waits = state[left] == undecided && left < i,
                     right_waits = state[right] == undecided, before_left = below(i, left),
                     before_right = below(i, right);
          return waits && (!left_waits || before_left) && (!right_waits || before_right);
        },
        [&](int i, bool lowest) { goes[i] = lowest; });
    __syncthreads();
    struct Link {
      int state;
      bool picked, beside;  // beside: a neighbour is picked
    };
    int changed = 0;
    team.for_each_read<8>(
        links,
        [&](int i) {
          const int left = goes[max(i - 1, 0)], right = goes[i + 1];
          return Link{state[i], goes[i] != 0, (i > 0 && left != 0) || right != 0};
        },
        [&](int i, const Link& link) {
          if (link.state != undecided) return;
          if (link.picked) state[i] = in, changed = 1;
          if (link.beside) state[i] = out;
        });
    more = __syncthreads_or(changed) != 0;
  }
  team.for_each(n, [&](int i) { goes[i] = 0; });
  __syncthreads();
  const auto picked = [&](int i) { return state[i] == in; };
  mark(picked, scored ? min(left, team.count(links, picked)) : left, scored);
}

/// Link victims' targets: the slot to their left, or the one that their run becomes. Gives a barrier.
__device__ __noinline__ inline void link_targets(const Play& play, Picks picks) {
  const Unit& unit = play.unit;
  struct Place {
    int slot, target;
  };
  play.team.for_each_read(
      play.size,
      [&](int i) {
        const int slot = unit.order[i];
        int left = i - 1;
        if (picks == Picks::fold && !unit.stays[slot])
          while (left >= 0 && !unit.stays[unit.order[left]]) --left;
        const int target = unit.order[max(left, 0)];
        return Place{slot, unit.stays[slot] || left < 0 ? -1 : target};
      },
      [&](int, const Place& place) { unit.target[place.slot] = place.target; });
  __syncthreads();
}

}  // namespace kv
