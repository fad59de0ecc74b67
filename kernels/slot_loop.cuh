// The slots of a unit as the hooks of single tokens see them.
#pragma once
#include "kernels/play.cuh"
#include "policies/policy.hpp"

namespace kv {

/// One row's observation of a slot, in registers: policies/views.hpp's Observed for groups of at most `heads`.
template <int heads>
class RowObserved {
 public:
  __device__ RowObserved(const float (&sums)[heads], int group) : group_(group) {
#pragma unroll
    for (int g = 0; g < heads; ++g) sums_[g] = sums[g];
  }
  __device__ float operator[](int head) const {
    float sum = 0;
#pragma unroll
    for (int g = 0; g < heads; ++g) sum = g == head ? sums_[g] : sum;
    return sum;
  }
  __device__ int group() const { return group_; }
  __device__ int rows() const { return 1; }
  __device__ const float* sums() const { return sums_; }
  __device__ float mean() const {
    float sum = 0;
#pragma unroll
    for (int g = 0; g < heads; ++g) sum = g < group_ ? sum + sums_[g] : sum;
    return sum / static_cast<float>(group_);
  }
  __device__ float max() const {
    float best = sums_[0];
#pragma unroll
    for (int g = 1; g < heads; ++g) best = g < group_ && sums_[g] > best ? sums_[g] : best;
    return best;
  }

 private:
  float sums_[heads];
  int group_;
};

/// Query heads of a group that a step observes and scores in one loop; of larger ones it makes two.
constexpr int loop_heads = 4;

/// The slots of a unit as a loop over them sees them: pointers and what a row left, read once, since stores in the loop
/// would make the compiler read them again from shared memory each time.
template <class P>
struct SlotLoop {
  using Slot = typename P::Slot;
  const HeadInfo info;
  const Protect protect;
  const int now, logit_stride;
  const int *const token, *const multiplicity;
  Slot* const state;
  float* const logits;
  const float *const bias, *const probe;
  const float* const log_sum;  // of the heads of the latest row, where they fit

  __device__ SlotLoop(const Fixed& f, int now_)
      : info(f.unit.info),
        protect(f.unit.protect),
        now(now_),
        logit_stride(f.logit_stride),
        token(f.unit.token),
        multiplicity(f.unit.multiplicity),
        state(reinterpret_cast<Slot*>(f.unit.state)),
        logits(f.logits),
        bias(f.unit.bias),
        probe(f.unit.probe),
        log_sum(f.row.own_log_sum()) {}

  template <class Seen = Observed>
  __device__ SlotView<Slot, Seen> view(int s, int slot_token, float key_probe = 0, const Seen& seen = {}) const {
    return {state[s], info, slot_token, now, multiplicity[s], key_probe, seen};
  }

  /// A thread's own slots are every team_threads-th from here on: those of a cache as large as a team, and the newest one, leave the
  /// warps that stream with one slot a thread.
  __device__ static int first_slot() { return static_cast<int>(threadIdx.x ^ (32 * stream_warps)); }
  static_assert(2 * stream_warps == team_warps);

  /// f(slot, its token) for a thread's own slots: two a turn, since a cache as large as a team has one slot more in steps.
  template <class F>
  __device__ __forceinline__ void each(int size, F f) const {
    const int first = first_slot();
    if (first >= size) return;
    int next = token[first];  // read ahead of its turn, since it may lie in device memory
#pragma unroll 1
    for (int s = first; s < size; s += 2 * team_threads) {
      const int slot_token = next, other = s + team_threads, other_token = other < size ? token[other] : 0;
      if (other + team_threads < size) next = token[other + team_threads];
      f(s, slot_token);
      if (other < size) f(other, other_token);
    }
  }

  /// f(slot, its token) for a thread's own slots after on_attention of the row just attended, for groups of at most `heads`: its
  /// owner's own data only.
  template <int heads = loop_heads, class F>
  __device__ __forceinline__ void observe(const P& policy, int size, F f) const {
    if constexpr (detail::declares_on_attention<P>)
      each_two<heads, Looks::observes>(size, [&](int s, int slot_token, const float(&weighed)[heads]) {
        policy.on_attention(view(s, slot_token), RowObserved<heads>(weighed, info.group));
        f(s, slot_token);
      });
  }

  /// f(slot, its token, a window's statistic of the row just attended) for a thread's own slots, for groups of at most loop_heads.
  template <class F>
  __device__ __forceinline__ void each_seen(int size, F f) const {
    each_two<loop_heads, Looks::weighs_window>(size, [&](int s, int slot_token, const float(&weighed)[loop_heads]) {
      f(s, slot_token, RowObserved<loop_heads>(weighed, info.group));
    });
  }

  /// The score of one slot, by a slot hook or one that sees the head. `seen`: what a window has seen of it, if there is one.
  template <class Head, class Seen>
  __device__ float score(const P& policy, Head& head, int s, int slot_token, const Seen& seen) const {
    if constexpr (detail::declares_score<P>)
      return policy.score(view(s, slot_token, policy.traits().key_probe ? probe[s] : 0.f, seen));
    else if constexpr (detail::declares_score_in<P>)
      return policy.score_in(head, s);
    else
      return 0;
  }

 private:
  enum class Looks { observes, weighs_window };

  /// What a loop reads of a slot ahead of its turn.
  template <int heads>
  struct Read {
    int token;
    float logit[heads], bias;
  };
  template <int heads>
  __device__ __forceinline__ Read<heads> read(int s) const {
    Read<heads> ahead{token[s], {}, 0};
#pragma unroll
    for (int g = 0; g < heads; ++g) ahead.logit[g] = g < info.group ? logits[g * logit_stride + s] : -INFINITY;
    if constexpr (detail::declares_log_bias<P>) ahead.bias = bias[s];
    return ahead;
  }

  /// f(slot, its token, what `weigh` or weigh_window makes of the row just attended, head by head, 0 beyond the group) for a
  /// thread's own slots: two at a time, since each is a chain of operations that wait for one another.
  template <int heads, Looks looks, class F>
  __device__ __forceinline__ void each_two(int size, F f) const {
    constexpr int step = 2 * team_threads;
    const int first = first_slot();
    if (first >= size) return;
    const auto other = [&](int s) { return s + team_threads < size ? s + team_threads : s; };
    Read<heads> next[2] = {read<heads>(first), read<heads>(other(first))};
    float log_sums[heads];
#pragma unroll
    for (int g = 0; g < heads; ++g) log_sums[g] = g < info.group ? log_sum[g] : 0.f;
#pragma unroll 1
    for (int s = first; s < size; s += step) {
      const Read<heads> mine[2] = {next[0], next[1]};
      if (s + step < size) next[0] = read<heads>(s + step), next[1] = read<heads>(other(s + step));
      float weighed[2][heads];
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int g = 0; g < heads; ++g) weighed[k][g] = weigh<looks>(mine[k].logit[g], mine[k].bias, log_sums[g]);
      f(s, mine[0].token, weighed[0]);
      if (s + team_threads < size) f(s + team_threads, mine[1].token, weighed[1]);
    }
  }

  template <Looks looks>
  __device__ __forceinline__ static float weigh(float logit, float bias, float log_sum) {
    const float p = exp2_fast((logit + bias - log_sum) * log2_e);
    if constexpr (looks == Looks::weighs_window && detail::declares_weigh_window<P>)
      return logit > -INFINITY ? P::weigh_window(p, logit, 0) : 0.f;
    else if constexpr (detail::declares_weigh<P>)
      return logit > -INFINITY ? P::weigh(p, logit, 0) : 0.f;
    else
      return p;
  }
};

}  // namespace kv
