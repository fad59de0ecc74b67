// A unit under way with its policy: every hook, called where core/head_replay.cpp calls it. Folding is in fold.cuh.
#pragma once
#include "kernels/choose.cuh"
#include "kernels/fold.cuh"
#include "policies/policy.hpp"

namespace kv {

template <class P>
struct Player : Play {
  using PolicyType = P;
  using Slot = typename P::Slot;
  using Scratch = typename P::Scratch;
  using HeadState = typename P::HeadState;
  using Head = HeadView<Slot, HeadState, Scratch, DeviceRow>;

  const P& policy;
  const Traits traits;
  const Unit* units;
  Head head{};
  bool probe_known = false;  // head.probe() of every slot, from the row just attended

  __device__ Player(const Play& play, const P& policy_, const Unit* units_)
      : Play(play), policy(policy_), traits(policy_.traits()), units(units_) {
    head.info_ = &unit.info;
    head.keys_ = unit.keys, head.values_ = unit.values, head.elements_ = trace.elements;
    head.token_ = unit.token, head.multiplicity_ = unit.multiplicity, head.order_ = unit.order, head.rank_ = unit.rank;
    head.state_ = reinterpret_cast<Slot*>(unit.state), head.scratch_ = reinterpret_cast<Scratch*>(unit.scratch);
    head.head_state_ = reinterpret_cast<HeadState*>(unit.head_state);
    head.vector_ = unit.vector, head.value_vector_ = unit.value_vector;
    head.probe_ = unit.probe, head.score_ = unit.score;
    head.sight_.seen = {unit.sums, 1, trace.group};
    head.sight_.kept = unit.stays, head.sight_.target = unit.target, head.sight_.similarity = unit.similarity;
    head.sight_.key_gradient = unit.gradient;
    head.sight_.query_mean = unit.query_mean, head.sight_.query_covariance = unit.query_covariance;
    head.sight_.future_mass = unit.future;
    head.sight_.output_norm = layer.norms ? layer.norms + static_cast<long>(unit.info.kv_head) * trace.tokens : nullptr;
  }

  /// Refreshes what a view of the head says of the moment; call before any hook.
  __device__ void look_around() {
    head.moment_ = {now, phase, progress.compressions, block};
    head.size_ = size;
  }
  __device__ SlotView<Slot> view(int s, float probe = 0) const {
    return {head.state(s), unit.info, unit.token[s], now, unit.multiplicity[s], probe};
  }

  /// All per-slot data as it was before the first token.
  __device__ void begin() {
    team.for_each(unit.capacity, [&](int s) {
      head.scratch(s) = Scratch{};
      unit.stays[s] = 1;
    });
    if (threadIdx.x == 0) head.shared() = HeadState{};
    if (traits.key_probe) team.for_each(trace.key_dim, [&](int c) { unit.vector[c] = 0; });
    if (traits.value_vector) team.for_each(trace.value_dim, [&](int c) { unit.value_vector[c] = 0; });
    if (unit.query_sum) {
      team.for_each(trace.group * trace.key_dim, [&](int i) { unit.query_sum[i] = 0; });
      team.for_each(trace.group * trace.key_dim * trace.key_dim, [&](int i) { unit.query_outer[i] = 0; });
    }
  }

  /// Tokens [first, last) become slots. Needs and gives a barrier.
  __device__ __noinline__ void append(int first, int last) {
    const int before = size;
    append_rows(first, last, before);
    for (int s = before + static_cast<int>(threadIdx.x); s < before + last - first; s += team_threads) {
      head.state(s) = Slot{};
      unit.stays[s] = 1;
      unit.parent[first + s - before] = first + s - before;
    }
    size = before + last - first;
    look_around();
    if constexpr (detail::declares_on_append<P>) {
      __syncthreads();
      const bool in_turn = traits.key_probe || traits.value_vector;  // rows add to one vector
      for (int s = before; s < size; ++s)
        if (static_cast<int>(threadIdx.x / 32) == (in_turn ? 0 : s % team_warps)) policy.on_append(WarpRows{}, head, s);
    }
    __syncthreads();
  }

  /// unit.bias of slots [0, n); those beyond `size` belong to a probed block and have none. Gives a barrier.
  __device__ __noinline__ const float* biases(int n) {
    if constexpr (!detail::declares_log_bias<P>) return nullptr;
    look_around();
    team.for_each(n, [&](int s) {
      if constexpr (detail::declares_log_bias<P>) unit.bias[s] = s < size ? policy.log_bias(view(s)) : 0.f;
    });
    __syncthreads();
    return unit.bias;
  }

  /// on_attention of a block, from unit.sums. Gives a barrier.
  __device__ void observe_block(int rows) {
    if constexpr (detail::declares_on_attention<P>) {
      look_around();
      team.for_each(size, [&](int s) {
        policy.on_attention(view(s), Observed{unit.sums + static_cast<long>(s) * trace.group, rows, trace.group});
      });
      __syncthreads();
    }
  }

  /// What one row's `weigh` (or weigh_window) makes of a slot and head: 0 where the row cannot see it.
  __device__ float weighed(int s, int g, bool window, int rows_after) const {
    const float logit = logits[static_cast<long>(g) * logit_stride + s];
    if (logit == -INFINITY) return 0;
    const float x = detail::declares_log_bias<P> ? logit + unit.bias[s] : logit;
    const float p = exp2f((x - static_cast<float>(row.lse[g])) * log2_e);
    if constexpr (detail::declares_weigh_window<P>)
      if (window) return P::weigh_window(p, logit, rows_after);
    if constexpr (detail::declares_weigh<P>) return P::weigh(p, logit, rows_after);
    return p;
  }

  /// on_attention of the row just attended: a thread's own slots only, so without a barrier.
  __device__ void observe_row() {
    if constexpr (detail::declares_on_attention<P>) {
      look_around();
      team.for_each(size, [&](int s) {
        float mine[stream_heads];
        float* sums = trace.group <= stream_heads ? mine : unit.sums + static_cast<long>(s) * trace.group;
        for (int g = 0; g < trace.group; ++g) sums[g] = weighed(s, g, false, 0);
        policy.on_attention(view(s), Observed{sums, 1, trace.group});
      });
    }
  }

  /// unit.sums of the row just attended, added to what is there (`first`: instead of it).
  __device__ void sum_row(bool window, int rows_after, bool first) {
    team.for_each(size, [&](int s) {
      for (int g = 0; g < trace.group; ++g) {
        float& sum = unit.sums[static_cast<long>(s) * trace.group + g];
        const float mine = weighed(s, g, window, rows_after);
        sum = first ? mine : sum + mine;
      }
    });
  }

  /// Whether a compression is due after (or, for probing policies, before) the present block.
  __device__ bool over_budget() const { return traits.needs_budget() && size > budget; }
  __device__ bool due(int first) const {
    if (!traits.compresses) return false;
    if (phase == Phase::prompt) return traits.needs_budget() ? over_budget() : size > 1;
    return settings.compress == Compress::always && over_budget() &&
           (first - trace.prompt_tokens + 1) % traits.interval == 0;
  }

  /// Fills unit.score. Gives a barrier.
  __device__ __noinline__ void score(int window_rows) {
    look_around();
    head.sight_.seen.rows = window_rows;
    if (traits.key_probe && !probe_known) {
      for (int s = static_cast<int>(threadIdx.x / 32); s < size; s += team_warps) {
        const float dot = WarpRows{}.dot(head.key(s), detail::FloatRow{unit.vector});
        if (threadIdx.x % 32 == 0) unit.probe[s] = dot;
      }
      __syncthreads();
    }
    if constexpr (detail::declares_on_compress<P>)
      policy.on_compress(team, head);
    else
      team.for_each(size, [&](int s) { unit.score[s] = score_of(s); });
    __syncthreads();
  }
  __device__ float score_of(int s) {
    if constexpr (detail::declares_score<P>)
      return policy.score(view(s, traits.key_probe ? unit.probe[s] : 0));
    else if constexpr (detail::declares_score_in<P>)
      return policy.score_in(head, s);
    else
      return 0;
  }

  /// One round: from candidates to a smaller cache. Needs and gives a barrier.
  __device__ __noinline__ void compress(int buffer) {
    const DeviceCandidates c = decisive(*this, units, traits.scope == Scope::layer, buffer);
    if (traits.select == Select::links)
      select_links(*this, c, traits, unit.work[0], unit.work[1]);
    else
      select_slots(*this, c, unit.work[0]);
    int gone = mark_slots(*this, unit.work[0]);
    look_around();
    if (traits.select == Select::links)
      link_targets(*this, traits.picks);
    else
      team.for_each(size, [&](int s) { unit.target[s] = -1; });
    if constexpr (detail::declares_on_merge<P>)
      if (traits.nearest != Nearest::none) {
        __syncthreads();
        find_nearest(*this);
      }
    if constexpr (detail::declares_on_selected<P>) {
      __syncthreads();
      policy.on_selected(team, head);
    }
    __syncthreads();
    int* going = unit.work[0];  // victims in token order
    const auto goes = [&](int i) { return unit.stays[unit.order[i]] == 0; };
    gone = team.number(size, goes, [&](int i, int before) { unit.work[1][i] = before; });
    team.for_each(size, [&](int i) {
      if (goes(i)) going[unit.work[1][i]] = unit.order[i];
    });
    __syncthreads();
    bool merges = traits.merges;
    if constexpr (!detail::declares_on_merge<P>) merges = false;
    if (!merges) {
      if (threadIdx.x == 0) progress.evictions += gone;
      if (traits.select == Select::links) count_as_if_merged(*this, traits.clip);
      drop(going, gone);
    } else if (traits.one_at_a_time && gone > 1) {
      one_by_one(c, going, gone);
    } else {
      if constexpr (detail::declares_on_merge<P>) {
        if (gone == 1)
          fold_one(*this, going[0]);
        else
          fold_many(*this, going, gone);
      }
      drop(going, gone);
    }
  }

  /// The single victim of a policy that merges nothing, known without places.
  __device__ void evict_one(int victim) {
    if (threadIdx.x == 0) ++progress.evictions;
    drop(&victim, 1);
  }

  /// Slots going[0 .. gone) leave. Gives a barrier.
  __device__ __noinline__ void drop(const int* going, int gone) {
    if constexpr (detail::declares_on_evict<P>) {
      look_around();
      for (int i = 0; i < gone && threadIdx.x < 32; ++i) policy.on_evict(WarpRows{}, head, going[i]);
      __syncthreads();
    }
    if (gone == 1) {
      const int victim = going[0], last = size - 1;
      remove_one(victim);
      if (victim != last && threadIdx.x == 0) {
        head.state(victim) = head.state(last);
        unit.stays[victim] = unit.stays[last], unit.stays[last] = 1;
      } else if (threadIdx.x == 0) {
        unit.stays[victim] = 1;
      }
      __syncthreads();
    } else if (gone > 1) {
      remove_many([&](int from, int to) { head.state(to) = head.state(from); });
    }
  }

 private:
  /// The victims one by one, the lowest score first, each plan seeing the folds before it. Slots move: tokens do not.
  __device__ __noinline__ void one_by_one(const DeviceCandidates& c, const int* going, int gone) {
    int* tokens = unit.work[4];
    const auto key_of = [&](int i) {
      const int place = unit.rank[going[i]];
      if (c.safety[place] != safety_normal) return 1ull << 63 | static_cast<unsigned long long>(place);
      return static_cast<unsigned long long>(Cut::key_of(c.score[place])) << 31 |
             static_cast<unsigned long long>(0x7fffffff - place);
    };
    unsigned long long last = 0;
    for (int i = 0; i < gone; ++i) {
      unsigned long long mine = ~0ull;
      team.for_each(gone, [&](int j) {
        const unsigned long long key = key_of(j) + 1;  // from 1, so that 0 is before all
        if (key > last && key < mine) mine = key;
      });
      last = team.min_key(mine);
      team.for_each(gone, [&](int j) {
        if (key_of(j) + 1 == last) tokens[i] = unit.token[going[j]];
      });
    }
    __syncthreads();
    for (int i = 0; i < gone; ++i) {
      const int victim = slot_of_query(tokens[i], size);
      __syncthreads();
      if constexpr (detail::declares_on_merge<P>) fold_one(*this, victim);
      drop(&victim, 1);
    }
  }
};

}  // namespace kv
