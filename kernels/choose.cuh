// Which slots stay: core/select.cpp's rule by a thread block. Everything is by place (token order) until stays[slot].
#pragma once
#include <climits>

#include "kernels/play.cuh"
#include "policies/policy.hpp"

namespace kv {

/// core/select.hpp's Safety as bytes.
enum : std::uint8_t { safety_normal, safety_protected, safety_sink };

__device__ inline std::uint8_t safety_of(const Protect& protect, int now, float score, int token) {
  if (score == INFINITY || token < protect.sinks) return safety_sink;
  return score == kv::protect || now - token < protect.recent ? safety_protected : safety_normal;
}

__device__ __noinline__ inline float report_nan(Fixed& fixed, int slot, int token) {
  Play(fixed).fail(UnitError::nan_score, slot, token);
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
  struct Candidate {
    int slot, token, next_token;
    float score;
  };
  BlockTeam{&fixed.team}.for_each_read(
      size,
      [&](int i) {
        const int slot = unit.order[i];
        return Candidate{slot, unit.token[slot], links && i + 1 < size ? unit.token[unit.order[i + 1]] : INT_MIN / 2,
                         unit.score[slot]};
      },
      [&](int i, const Candidate& c) {
        const float score = checked_score(fixed, c.score, c.slot, c.token);
        std::uint8_t safety = safety_of(unit.protect, now, score, c.token);
        if (safety == safety_normal && now - c.next_token < unit.protect.recent) safety = safety_protected;
        unit.safety_at[buffer][i] = safety;
        unit.score_at[buffer][i] = safety == safety_normal ? score : 0;  // sums over heads stay finite
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
  play.team.for_each(play.size, [&](int i) {  // scores add up, the higher safety wins
    float score = 0;
    std::uint8_t safety = 0;
#pragma unroll 8
    for (int h = 0; h < unit.layer_heads; ++h) {
      const float theirs = __ldcg(scores + h * scores_apart + i);
      const std::uint8_t safe = __ldcg(safeties + h * safeties_apart + i);
      score = h == 0 ? theirs : score + theirs;
      safety = safe > safety ? safe : safety;
    }
    unit.all_score[i] = score, unit.all_safety[i] = safety;
  });
  __syncthreads();
  return {unit.all_score, unit.all_safety};
}

/// The k-th smallest key of those i < n that take part (k from 1), and how many of that key are among the k: a radix
/// selection, 8 bits at a time.
struct Threshold {
  unsigned key;
  int equal;
};
template <bool ahead, class Takes, class Key>
__device__ Threshold kth_smallest(BlockTeam team, int n, int k, Takes takes, Key key_of) {
  struct Candidate {
    unsigned key;
    bool takes_part;
  };
  const uint32_t counts = shared_address(team.memory->counts);
  unsigned prefix = 0;
  int left = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    team.for_each(256, [&](int i) { team.memory->counts[i] = 0; });
    __syncthreads();
    const unsigned mask = shift == 24 ? 0u : ~0u << (shift + 8);
    const auto count_in = [&](unsigned key) {
      if ((key & mask) == prefix) count_one(counts + 4 * (key >> shift & 255u));
    };
    if constexpr (ahead)
      team.for_each_read<8>(
          n,
          [&](int i) {
            return Candidate{key_of(i), takes(i)};
          },
          [&](int, const Candidate& c) {
            if (c.takes_part) count_in(c.key);
          });
    else
      team.for_each(n, [&](int i) {
        if (takes(i)) count_in(key_of(i));
      });
    __syncthreads();
    int before;
    const int mine = team.memory->counts[threadIdx.x];
    team.scan(mine, before);
    if (before < left && before + mine >= left) {
      team.memory->flag = static_cast<int>(threadIdx.x);
      team.memory->number = left - before;
    }
    __syncthreads();
    prefix |= static_cast<unsigned>(team.memory->flag) << shift;
    left = team.memory->number;
    __syncthreads();
  }
  return {prefix, left};
}

/// Marks in `goes` (by place) the k candidates of the lowest scores among those that take part; `older_first`: of equals
/// the older, else the newer. Gives a barrier.
template <bool ahead, class Takes>
__device__ void mark_lowest(BlockTeam team, const DeviceCandidates& c, int n, int k, bool older_first, Takes takes,
                            int* goes) {
  if (k <= 0) return;
  const auto key = [&](int i) { return Cut::key_of(c.score[i]); };
  const Threshold threshold = kth_smallest<ahead>(team, n, k, takes, key);
  const auto place = [&](int i) { return older_first ? i : n - 1 - i; };
  team.number(
      n, [&](int i) { return takes(place(i)) & (key(place(i)) == threshold.key); },
      [&](int i, bool equal, int before) {
        const int at = place(i);
        if (equal ? before < threshold.equal : takes(at) && key(at) < threshold.key) goes[at] = 1;
      });
  __syncthreads();
}

/// core/select.cpp's select: goes[place] = 1 for all that does not stay. Gives a barrier. `ahead`: reads ahead, for the many
/// slots of a prompt; what a step calls does without, for its registers are the step loop's.
template <bool ahead>
__device__ __noinline__ void select_slots(const Play& play, const DeviceCandidates& c, int* goes) {
  const BlockTeam team = play.team;
  const int n = play.size, budget = play.budget;
  const int safe = team.count(n, [&](int i) { return c.safety[i] != safety_normal; });
  if (safe <= budget) {
    team.for_each(n, [&](int i) { goes[i] = 0; });
    __syncthreads();
    mark_lowest<ahead>(
        team, c, n, n - budget, false, [&](int i) { return c.safety[i] == safety_normal; }, goes);
    return;
  }
  // The first sinks, leaving one slot for another; then the newest of what is protected.
  const int sinks = team.number(
      n, [&](int i) { return c.safety[i] == safety_sink; },
      [&](int i, bool is_sink, int before) { goes[i] = !(is_sink && before < budget - 1); });
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
}

/// core/select.cpp's select_links: goes[place + 1] = 1 for every link (place, place + 1) that is joined. `state` is [n].
/// Gives a barrier.
__device__ __noinline__ inline void select_links(const Play& play, const DeviceCandidates& c, const Traits& traits,
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
  const auto is_normal = [&](int i) { return i < links && safety(i) == safety_normal; };
  const auto is_safe = [&](int i) { return i < links && safety(i) == safety_protected; };
  int left = by_limit ? n : n - budget;
  if (left <= 0 || links <= 0) return;
  const auto mark = [&](auto takes, int k, bool scored) {  // links by place; goes is by the right slot
    if (k <= 0) return;
    team.for_each(n, [&](int i) { state[i] = 0; });
    __syncthreads();
    if (scored)
      mark_lowest<false>(team, c, links, k, true, takes, state);
    else
      team.number(links, takes, [&](int i, bool taken, int before) { state[i] = taken && before < k; });
    __syncthreads();
    team.for_each(links, [&](int i) {
      if (state[i]) goes[i + 1] = 1;
    });
    __syncthreads();
  };
  if (traits.picks != Picks::disjoint) {
    const auto low = [&](int i) { return is_normal(i) && (!by_limit || c.score[i] < traits.every_link_below); };
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
  team.for_each(n, [&](int i) { state[i] = takes(i) ? undecided : out; });
  __syncthreads();
  const auto below = [&](int i, int j) {  // whether link i is picked before its neighbour j
    const float a = c.score[i], b = c.score[j];
    return scored ? a < b || (a == b && i < j) : i < j;
  };
  for (bool more = true; more;) {
    team.for_each_read(
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
    team.for_each_read(
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
  const auto picked = [&](int i) { return i < links && state[i] == in; };
  const int all = team.count(links, picked);
  if (!scored) {
    team.number(links, picked, [&](int i, bool is_picked, int before) {
      if (is_picked && before < left) goes[i + 1] = 1;
    });
    __syncthreads();
    return;
  }
  // mark() needs its own `state`: the lowest are marked in place, shifted by one afterwards.
  int* lowest = play.unit.work[2];
  team.for_each(n, [&](int i) { lowest[i] = 0; });
  __syncthreads();
  mark_lowest<false>(team, c, links, min(left, all), true, picked, lowest);
  team.for_each(links, [&](int i) {
    if (lowest[i]) goes[i + 1] = 1;
  });
  __syncthreads();
}

/// From places to slots: stays[slot], and how many go. Gives a barrier.
template <bool ahead>
__device__ __noinline__ int mark_slots(const Play& play, const int* goes) {
  const int gone = play.team.count(play.size, [&](int i) { return goes[i] != 0; });
  struct Place {
    int slot;
    bool stays;
  };
  play.team.for_each_read<ahead ? 8 : 4>(
      play.size,
      [&](int i) {
        return Place{play.unit.order[i], goes[i] == 0};
      },
      [&](int, const Place& mine) { play.unit.stays[mine.slot] = mine.stays; });
  __syncthreads();
  return gone;
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
