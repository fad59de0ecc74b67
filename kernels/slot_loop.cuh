// The slots of a unit as the hooks of single tokens see them.
#pragma once
#include "kernels/play.cuh"
#include "policies/policy.hpp"

namespace kv {

/// One row's observation of a slot, in registers: policies/views.hpp's Observed for groups that fit.
class RowObserved {
 public:
  __device__ RowObserved(const float (&sums)[stream_heads], int group) : group_(group) {
#pragma unroll
    for (int g = 0; g < stream_heads; ++g) sums_[g] = sums[g];
  }
  __device__ float operator[](int head) const {
    float sum = 0;
#pragma unroll
    for (int g = 0; g < stream_heads; ++g) sum = g == head ? sums_[g] : sum;
    return sum;
  }
  __device__ int group() const { return group_; }
  __device__ int rows() const { return 1; }
  __device__ float mean() const {
    float sum = 0;
#pragma unroll
    for (int g = 0; g < stream_heads; ++g) sum = g < group_ ? sum + sums_[g] : sum;
    return sum / static_cast<float>(group_);
  }
  __device__ float max() const {
    float best = sums_[0];
#pragma unroll
    for (int g = 1; g < stream_heads; ++g) best = g < group_ && sums_[g] > best ? sums_[g] : best;
    return best;
  }

 private:
  float sums_[stream_heads];
  int group_;
};

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
  float first_log_sums[4];     // the first of them

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
        log_sum(f.row.own_log_sum()) {
#pragma unroll
    for (int g = 0; g < 4; ++g) first_log_sums[g] = g < info.group ? log_sum[g] : 0.f;
  }

  __device__ SlotView<Slot> view(int s, int slot_token, float key_probe = 0) const {
    return {state[s], info, slot_token, now, multiplicity[s], key_probe};
  }

  /// What a loop reads of a slot ahead of its turn, since it may lie in device memory: its token and, if it is observed, the
  /// first heads' logits.
  struct Read {
    int token;
    float logit[4];
  };
  template <bool observed>
  __device__ __forceinline__ Read read(int s) const {
    Read ahead{token[s], {}};
    if constexpr (observed)
#pragma unroll
      for (int g = 0; g < 4; ++g) ahead.logit[g] = g < info.group ? logits[g * logit_stride + s] : -INFINITY;
    return ahead;
  }

  /// f(slot, what was read of it) for a thread's own slots.
  template <bool observed, class F>
  __device__ __forceinline__ void each(int size, F f) const {
    const int first = static_cast<int>(threadIdx.x);
    if (first >= size) return;
    Read next = read<observed>(first);
#pragma unroll 1
    for (int s = first; s < size; s += team_threads) {
      const Read mine = next;
      if (s + team_threads < size) next = read<observed>(s + team_threads);
      f(s, mine);
    }
  }

  /// What `weigh` (or, of a `window`, weigh_window) makes of the row just attended, head by head, for one slot of a group
  /// that fits; 0 beyond the group.
  template <bool window>
  __device__ __forceinline__ void weigh(int s, const Read& mine, float (&weighed)[stream_heads]) const {
    const float b = detail::declares_log_bias<P> ? bias[s] : 0.f;
#pragma unroll
    for (float& each : weighed) each = 0;
#pragma unroll
    for (int g0 = 0; g0 < stream_heads; g0 += 4) {
      if (g0 >= info.group) break;
#pragma unroll
      for (int g = g0; g < g0 + 4; ++g) {
        const float logit = g0 == 0 ? mine.logit[g % 4] : g < info.group ? logits[g * logit_stride + s] : -INFINITY;
        const float p = exp2_fast((logit + b - (g0 == 0 ? first_log_sums[g % 4] : log_sum[g])) * log2_e);
        if constexpr (window && detail::declares_weigh_window<P>)
          weighed[g] = logit > -INFINITY ? P::weigh_window(p, logit, 0) : 0.f;
        else if constexpr (detail::declares_weigh<P>)
          weighed[g] = logit > -INFINITY ? P::weigh(p, logit, 0) : 0.f;
        else
          weighed[g] = p;
      }
    }
  }

  /// on_attention of the row just attended, for one slot of a group that fits: its owner's own data only.
  __device__ __forceinline__ void observe(const P& policy, int s, const Read& mine) const {
    if constexpr (detail::declares_on_attention<P>) {
      float weighed[stream_heads];
      weigh<false>(s, mine, weighed);
      policy.on_attention(view(s, mine.token), RowObserved(weighed, info.group));
    }
  }

  /// A window's statistic of the row just attended in the place of a slot's logits.
  __device__ __forceinline__ void weigh_in_place(int s, const Read& mine) const {
    float weighed[stream_heads];
    weigh<true>(s, mine, weighed);
#pragma unroll
    for (int g = 0; g < stream_heads; ++g)
      if (g < info.group) logits[g * logit_stride + s] = weighed[g];
  }

  /// The score of one slot, by a slot hook or one that sees the head.
  template <class Head>
  __device__ float score(const P& policy, Head& head, int s, int slot_token) const {
    if constexpr (detail::declares_score<P>)
      return policy.score(view(s, slot_token, policy.traits().key_probe ? probe[s] : 0.f));
    else if constexpr (detail::declares_score_in<P>)
      return policy.score_in(head, s);
    else
      return 0;
  }
};

}  // namespace kv
