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
  const float *const logits, *const bias, *const probe;
  float log_sum[stream_heads];  // of the heads of the latest row, where they fit

  /// `sums`: the row's log-sum-exps.
  __device__ SlotLoop(const Fixed& f, int now_, const float (&sums)[stream_heads])
      : info(f.unit.info),
        protect(f.unit.protect),
        now(now_),
        logit_stride(f.logit_stride),
        token(f.unit.token),
        multiplicity(f.unit.multiplicity),
        state(reinterpret_cast<Slot*>(f.unit.state)),
        logits(f.logits),
        bias(f.unit.bias),
        probe(f.unit.probe) {
#pragma unroll
    for (int g = 0; g < stream_heads; ++g) log_sum[g] = sums[g];
  }

  __device__ SlotView<Slot> view(int s, float key_probe = 0) const {
    return {state[s], info, token[s], now, multiplicity[s], key_probe};
  }

  /// on_attention of the row just attended, for one slot of a group that fits: its owner's own data only.
  __device__ void observe(const P& policy, int s) const {
    if constexpr (detail::declares_on_attention<P>) {
      float sums[stream_heads];
      const float b = detail::declares_log_bias<P> ? bias[s] : 0.f;
#pragma unroll
      for (int g = 0; g < stream_heads; ++g) {
        const float logit = g < info.group ? logits[static_cast<long>(g) * logit_stride + s] : -INFINITY;
        const float p = exp2_fast((logit + b - log_sum[g]) * log2_e);
        if constexpr (detail::declares_weigh<P>)
          sums[g] = logit > -INFINITY ? P::weigh(p, logit, 0) : 0.f;
        else
          sums[g] = p;
      }
      policy.on_attention(view(s), RowObserved(sums, info.group));
    }
  }

  /// The score of one slot, by a slot hook or one that sees the head.
  template <class Head>
  __device__ float score(const P& policy, Head& head, int s) const {
    if constexpr (detail::declares_score<P>)
      return policy.score(view(s, policy.traits().key_probe ? probe[s] : 0.f));
    else if constexpr (detail::declares_score_in<P>)
      return policy.score_in(head, s);
    else
      return 0;
  }
};

}  // namespace kv
