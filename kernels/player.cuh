// A unit under way with its policy: every hook, called where core/head_replay.cpp calls it. Folding is in fold.cuh.
#pragma once
#include "kernels/choose.cuh"
#include "kernels/fold.cuh"
#include "kernels/nearest.cuh"
#include "kernels/slot_loop.cuh"
#include "policies/policy.hpp"

namespace kv {

/// `plain`: of rows that are known to be of bfloat16 (step_look.cuh).
template <class P, bool plain = false>
struct Player : Play {
  using PolicyType = P;
  static constexpr bool of_plain_rows = plain;
  using Slot = typename P::Slot;
  using Scratch = typename P::Scratch;
  using HeadState = typename P::HeadState;
  using Head = HeadView<Slot, HeadState, Scratch, std::conditional_t<plain, PlainRow, DeviceRow>>;

  const P& policy;           // in shared memory; loops over slots take a copy
  bool probe_known = false;  // head.probe() of every slot, from the row just attended

  __device__ Player(Fixed& f, const P& policy_) : Play(f), policy(policy_) {}

  __device__ Traits traits() const { return policy.traits(); }
  static __device__ Dtype elements_of(const TraceData& trace) { return plain ? Dtype::bfloat16 : trace.elements; }
  __device__ Dtype elements() const { return elements_of(trace); }
  __device__ bool absolute() const { return plain || Play::absolute(); }
  __device__ Dtype dtype() const { return plain ? Dtype::bfloat16 : trace.dtype; }

  /// The head as hooks see it now, `rows` query rows having been summed in head.seen(). Made where it is used: what a hook
  /// does not read costs nothing.
  __device__ Head head(int rows = 1) const {
    Head h{};
    h.info_ = &unit.info, h.moment_ = {now, phase, progress.compressions, block}, h.size_ = size;
    h.keys_ = unit.keys, h.values_ = unit.values, h.elements_ = elements();
    h.token_ = unit.token, h.multiplicity_ = unit.multiplicity, h.order_ = unit.order, h.rank_ = unit.rank;
    h.state_ = reinterpret_cast<Slot*>(unit.state), h.scratch_ = reinterpret_cast<Scratch*>(unit.scratch);
    h.head_state_ = reinterpret_cast<HeadState*>(unit.head_state);
    h.vector_ = unit.vector, h.value_vector_ = unit.value_vector, h.probe_ = unit.probe, h.score_ = unit.score;
    h.sight_.seen = {unit.sums, rows, trace.group};
    h.sight_.kept = unit.stays, h.sight_.target = unit.target, h.sight_.similarity = unit.similarity;
    h.sight_.key_gradient = unit.gradient, h.sight_.query_mean = unit.query_mean;
    h.sight_.query_covariance = unit.query_covariance, h.sight_.future_mass = unit.future;
    h.sight_.output_norm = layer.norms ? layer.norms + static_cast<long>(unit.info.kv_head) * trace.tokens : nullptr;
    return h;
  }
  __device__ Slot& state(int s) const { return reinterpret_cast<Slot*>(unit.state)[s]; }
  __device__ SlotView<Slot> view(int s, float probe = 0, const Observed& seen = {}) const {
    return {state(s), unit.info, unit.token[s], now, unit.multiplicity[s], probe, seen};
  }

  /// All data as it was before the first token.
  __device__ void begin() {
    team.for_each(unit.capacity, [&](int s) {
      reinterpret_cast<Scratch*>(unit.scratch)[s] = Scratch{};
      unit.stays[s] = 1;
    });
    if (traits().scope == Scope::layer)  // sums over heads read four slots at a time, also where the last ones are none
      team.for_each((unit.capacity + 3) / 4 * 4, [&](int s) { unit.score_at[0][s] = unit.score_at[1][s] = NAN; });
    if (threadIdx.x == 0) *reinterpret_cast<HeadState*>(unit.head_state) = HeadState{};
    if (traits().key_probe) team.for_each(trace.key_dim, [&](int c) { unit.vector[c] = 0; });
    if (traits().value_vector) team.for_each(trace.value_dim, [&](int c) { unit.value_vector[c] = 0; });
    if (unit.query_sum) {
      team.for_each(trace.group * trace.key_dim, [&](int i) { unit.query_sum[i] = 0; });
      team.for_each(trace.group * trace.key_dim * trace.key_dim, [&](int i) { unit.query_outer[i] = 0; });
    }
  }

  /// Tokens [first, last) become slots. Needs and gives a barrier.
  __device__ void append(int first, int last) {
    const int before = size;
    append_rows(first, last, before);
    for (int s = before + static_cast<int>(threadIdx.x); s < before + last - first; s += team_threads) {
      state(s) = Slot{};
      unit.stays[s] = 1;
      unit.parent[first + s - before] = first + s - before;
    }
    size = before + last - first;
    if constexpr (detail::declares_on_append<P>) {
      __syncthreads();
      Head h = head();
      const bool in_turn =  // rows that may add to what the head has in common
          traits().key_probe || traits().value_vector || !std::is_empty_v<HeadState>;
      for (int s = before; s < size; ++s)
        if (static_cast<int>(threadIdx.x / 32) == (in_turn ? 0 : s % team_warps)) policy.on_append(WarpRows{}, h, s);
    }
    __syncthreads();
  }

  /// A token becomes slot size - 1, which the caller made room for: `key` and `value` are its rows, which write_rows_of() writes.
  /// By the clerk's warp.
  __device__ void append_one(int token, const void* key, const void* value) const {
    const int slot = size - 1, lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) {  // all addresses before the first store, after which the compiler would have to read them anew
      int *const token_at = unit.token + slot, *const multiplicity_at = unit.multiplicity + slot;
      int *const order_at = unit.order + slot, *const rank_at = unit.rank + slot;
      int* const rotated_at = absolute() ? nullptr : unit.rotated_at + slot;
      int *const parent_at = unit.parent + token, *const slots_at = unit.slots_at + block;
      Slot* const state_at = &state(slot);
      std::uint8_t* const stays_at = unit.stays + slot;
      *token_at = token, *multiplicity_at = 1, *order_at = *rank_at = slot;
      *state_at = Slot{}, *stays_at = 1, *parent_at = token, *slots_at = size;
      if (rotated_at) *rotated_at = -1;
    }
    __syncwarp();
    if constexpr (detail::declares_on_append<P>)
      row_hook<true>(fixed, policy, size, now, phase, block, slot, key, value);
  }
  /// on_append of one slot, or on_evict, by one warp. `key` and `value` are its rows, or null where memory has them. Inlined: a
  /// function's instructions lie far away, and every step would fetch them anew.
  template <bool appends>
  static __device__ __forceinline__ void row_hook(Fixed& fixed, const P& policy, int size, int now, Phase phase,
                                                  int block, int slot, const void* key = nullptr,
                                                  const void* value = nullptr) {
    Player player(fixed, policy);
    player.size = size, player.now = now, player.phase = phase, player.block = block;
    Head h = player.head();
    if (key) h.keys_.late_row = key, h.values_.late_row = value, h.keys_.late = h.values_.late = slot;
    float weight = 0;
    const ProbeRows rows{{}, player.unit.vector, key, &weight};
    if constexpr (appends)
      policy.on_append(rows, h, slot);
    else
      policy.on_evict(rows, h, slot);
    if (threadIdx.x % 32 == 0) fixed.row.stream.probe.weight[appends ? 1 : 0] = weight;
    __syncwarp();
  }

  /// unit.bias of slots [0, n); those beyond `size` belong to a probed block and have none. Gives a barrier.
  __device__ const float* biases(int n) {
    if constexpr (detail::declares_log_bias<P>) {
      fill_biases<4>(0, n, static_cast<int>(threadIdx.x), team_threads);
      __syncthreads();
      return unit.bias;
    }
    return nullptr;
  }
  /// Those of slots [first, last), by the i-th of so many threads: `ahead` slots at a time, whose logarithms overlap.
  template <int ahead = 2>
  __device__ void fill_biases(int first, int last, int i, int threads) {
    if constexpr (detail::declares_log_bias<P>) {
      const SlotLoop<P> slots(fixed, now);
      const P mine = policy;
      float* const bias = unit.bias;
      for (int s = first + i; s < last; s += ahead * threads) {
        float theirs[ahead];
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
          const int slot = min(s + k * threads, last - 1);
          theirs[k] = slot < size ? mine.log_bias(slots.view(slot, slots.token[slot])) : 0.f;
        }
#pragma unroll
        for (int k = 0; k < ahead; ++k)
          if (s + k * threads < last) bias[s + k * threads] = theirs[k];
      }
    }
  }

  /// on_attention of a block, from unit.sums. Gives a barrier.
  __device__ void observe_block(int rows) {
    if constexpr (detail::declares_on_attention<P>) {
      team.for_each(size, [&](int s) {
        policy.on_attention(view(s), Observed{unit.sums + static_cast<long>(s) * trace.group, rows, trace.group});
      });
      __syncthreads();
    }
  }

  /// What one row's `weigh` (or weigh_window) makes of a slot and head: 0 where the row cannot see it.
  __device__ float weighed(int s, int g, bool window, int rows_after) const {
    const float logit = fixed.logits[static_cast<long>(g) * fixed.logit_stride + s];
    if (logit == -INFINITY) return 0;
    const float x = detail::declares_log_bias<P> ? logit + unit.bias[s] : logit;
    const float* log_sum = trace.group <= stream_heads ? row.own_log_sum() : row.log_sum;
    const float p = exp2f((x - log_sum[g]) * log2_e);
    if constexpr (detail::declares_weigh_window<P>)
      if (window) return P::weigh_window(p, logit, rows_after);
    if constexpr (detail::declares_weigh<P>) return P::weigh(p, logit, rows_after);
    return p;
  }

  /// on_attention of the row just attended, for a thread's own slots: without a barrier. Not inlined: most steps observe while
  /// they score.
  __device__ void observe_row() const {
    if constexpr (detail::declares_on_attention<P>) observe_row_apart(fixed, policy, size, now, phase, block);
  }
  static __device__ __noinline__ void observe_row_apart(Fixed& fixed, const P& policy, int size, int now, Phase phase,
                                                        int block) {
    const SlotLoop<P> slots(fixed, now);
    const P mine = policy;
    const auto nothing_else = [](int, int) {};
    if (slots.info.group <= loop_heads) return slots.observe(mine, size, nothing_else);
    if (slots.info.group <= stream_heads) return slots.template observe<stream_heads>(mine, size, nothing_else);
    Player player(fixed, policy);
    player.size = size, player.now = now, player.phase = phase, player.block = block;
    for (int s = SlotLoop<P>::first_slot(); s < size; s += team_threads) {
      float* sums = player.unit.sums + static_cast<long>(s) * player.trace.group;
      for (int g = 0; g < player.trace.group; ++g) sums[g] = player.weighed(s, g, false, 0);
      policy.on_attention(player.view(s), Observed{sums, 1, player.trace.group});
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

  /// A window's, in the place of the logits, for a thread's own slots.
  __device__ void weigh_row_in_place() const {
    team.for_each(size, [&](int s) {
      for (int g = 0; g < trace.group; ++g) fixed.logits[g * fixed.logit_stride + s] = weighed(s, g, true, 0);
    });
  }

  /// Whether a compression is due after (or, for probing policies, before) the present block.
  __device__ bool over_budget() const { return traits().needs_budget() && size > budget; }
  __device__ bool due(int first) const { return due(first, trace, settings); }
  /// The same; `of` and `by` are `trace` and `settings`, from where they are read at the least cost.
  __device__ bool due(int first, const TraceData& of, const PlaySettings& by) const {
    if (!traits().compresses) return false;
    if (phase == Phase::prompt) return traits().needs_budget() ? over_budget() : size > 1;
    return by.compress == Compress::always && over_budget() && (first - of.prompt_tokens + 1) % traits().interval == 0;
  }

  /// key . vector of every slot, a warp a slot; needs a barrier before and gives one.
  static __device__ __noinline__ void probe_keys(const Fixed& f, int size) {
    for (int s = static_cast<int>(threadIdx.x / 32); s < size; s += team_warps) {
      const float dot = WarpRows{}.dot(DeviceRow::at(f.unit.keys, elements_of(f.trace), s, f.trace.key_dim),
                                       detail::FloatRow{f.unit.vector, f.trace.key_dim});
      if (threadIdx.x % 32 == 0) f.unit.probe[s] = dot;
    }
    __syncthreads();
  }

  /// Makes sure of head.probe(), where it is asked for. Gives a barrier when it has to.
  __device__ void know_probe() {
    if (traits().key_probe && !probe_known) probe_keys(fixed, size);
  }

  /// What the last queries saw of a slot, for policies that ask.
  __device__ Observed seen_in_window(const Head& h, int s) const {
    return traits().observation_window > 0 ? h.seen(s) : Observed{};
  }

  /// The score of one slot, by a slot hook or one that sees the head.
  __device__ float score_of(Head& h, int s) const {
    if constexpr (detail::declares_score<P>)
      return policy.score(view(s, traits().key_probe ? unit.probe[s] : 0, seen_in_window(h, s)));
    else if constexpr (detail::declares_score_in<P>)
      return policy.score_in(h, s);
    else
      return 0;
  }

  /// Makes sure that a slot whose score is forgotten is found out: of a thread's own slots, whose logits may lie there and have been
  /// looked at.
  static __device__ void forget_scores(const Fixed& f, int size) {
    float* const score = f.unit.score;
    for (int s = SlotLoop<P>::first_slot(); s < size; s += team_threads) score[s] = NAN;
  }
  /// Fills unit.score. Gives a barrier. `forgotten`: forget_scores() is done, and a barrier passed.
  __device__ void score(int window_rows, bool forgotten = false) const {
    score_apart(fixed, policy, size, now, phase, block, probe_known, window_rows, forgotten);
  }
  static __device__ __noinline__ void score_apart(Fixed& fixed, const P& policy_, int size, int now, Phase phase,
                                                  int block, bool probe_known, int window_rows, bool forgotten) {
    Player player(fixed, policy_);
    player.size = size, player.now = now, player.phase = phase, player.block = block, player.probe_known = probe_known;
    player.know_probe();
    Head h = player.head(window_rows);
    float* const score = player.unit.score;
    if constexpr (detail::declares_on_compress<P>) {
      if (!forgotten) {
        forget_scores(fixed, size);
        __syncthreads();
      }
      const P policy = player.policy;
      policy.on_compress(player.team, h);
    } else {
      player.team.for_each(player.size, [&](int s) { score[s] = player.score_of(h, s); });  // each once: it may write
    }
    __syncthreads();
  }

  /// One round: from candidates to a smaller cache. Needs and gives a barrier.
  __device__ void compress(int buffer, int window_rows) {
    Player copy = *this;
    compress_copy(copy, buffer, window_rows);
    follow(copy);
  }

  /// The `gone` slots that do not stay leave, one by one in the order of `going`, which one alone and on_evict are asked for.
  /// Gives a barrier.
  __device__ void drop(const int* going, int gone) {
    if (gone == 1) return drop_one(going[0]);
    if (gone == 0) return;
    if constexpr (detail::declares_on_evict<P>) {
      Head h = head();
      for (int i = 0; i < gone && threadIdx.x < 32; ++i) policy.on_evict(WarpRows{}, h, going[i]);
      __syncthreads();
    }
    remove_many(gone, [&](int from, int to) { state(to) = state(from); });
  }

  __device__ void drop_one(int victim) {
    const int last = size - 1, gap = unit.rank[victim];
    const bool adopted = is_clerk() && unit.parent[unit.token[victim]] != unit.token[victim];
    __syncthreads();
    let_go(victim, gap, at(unit.keys, last, trace.key_dim), at(unit.values, last, trace.value_dim), fixed.tile,
           adopted);
    __syncthreads();
  }

  /// `key` and `value`: the last slot's rows, which take the victim's place. `gap`: the victim's rank, read before the last
  /// barrier; -1 leaves order and rank behind, for find_order() to make again. One must follow: but the clerk knows all that
  /// he books, and the warp that streams the slot has its row. `tile` as patch() has it; `adopted`: the victim has joined another.
  __device__ void let_go(int victim, int gap, const void* key, const void* value, int tile, bool adopted) {
    if constexpr (detail::declares_on_evict<P>) {
      if (is_clerk_warp()) row_hook<false>(fixed, policy, size, now, phase, block, victim);
      __syncthreads();
    }
    if (gap >= 0) close_gap(victim, gap, static_cast<int>(threadIdx.x), team_threads);
    if (is_clerk()) book_removal(victim, adopted);
    take_place(victim, key, value, tile);
  }
  /// Play::book_removal, and the policy's data.
  __device__ void book_removal(int victim, bool adopted) const {
    constexpr bool merges = detail::declares_on_merge<P>;  // else all stand for themselves
    const int last = size - 1;
    Slot* const states = &state(0);
    std::uint8_t* const stays = unit.stays;
    const Slot moves = states[last];
    const std::uint8_t stayed = stays[last];
    Play::book_removal(victim, merges, adopted, !absolute());
    if (victim != last) states[victim] = moves, stays[victim] = stayed;
    stays[last] = 1;
  }

  /// find_nearest_to() of one victim. Not inlined, and of few words.
  static __device__ __noinline__ void find_nearest_apart(Fixed& fixed, const P& policy, int size, int now, Phase phase,
                                                         int block, int victim) {
    Player player(fixed, policy);
    player.size = size, player.now = now, player.phase = phase, player.block = block;
    Head h = player.head();
    find_nearest_to(player, h, victim);
  }

  /// Folds one victim, as fold_one() does. Not inlined, and of few words.
  static __device__ __noinline__ int fold_victim(Fixed& fixed, const P& policy, int size, int now, Phase phase,
                                                 int block, int victim, int gap, int rows) {
    if constexpr (detail::declares_on_merge<P>) {
      Player player(fixed, policy);
      player.size = size, player.now = now, player.phase = phase, player.block = block;
      Head h = player.head(rows);
      return fold_one(player, h, victim, gap);
    }
    return -1;
  }
  /// The same, and rings know of it. Returns the target, as fold_one().
  __device__ int fold_apart(int victim, int gap, int rows = 1) {
    const int target = fold_victim(fixed, policy, size, now, phase, block, victim, gap, rows);
    if (target >= 0) row_changed(target);
    if (target == many_targets) ring.running = false;
    return target;
  }

 private:
  static __device__ void compress_copy(Player& p, int buffer, int window_rows);
  __device__ void one_by_one(const DeviceCandidates& c, const int* going, int gone);
};

}  // namespace kv

#include "kernels/compress_round.cuh"
