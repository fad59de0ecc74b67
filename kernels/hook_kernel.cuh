// A policy's hooks as device code: one thread block per KV head runs every hook once over a cache in device memory. It
// shows that a policy file compiles for the GPU unchanged, and gives parity tests the hooks' results on equal inputs.
#pragma once
#include "core/random.hpp"
#include "policies/views.hpp"

namespace kv {

/// A thread block as a team. An index always meets the same thread, so passes over one's own slots need no sync().
struct BlockTeam {
  template <class F>
  __device__ void for_each(int n, F f) const {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) f(i);
  }
  /// As HostTeam::sum, in the same order of additions; blocks have 256 threads.
  template <class F>
  __device__ float sum(int n, F f) const {
    __shared__ float partial[256];
    float mine = 0;
    for_each(n, [&](int i) { mine += f(i); });
    __syncthreads();
    partial[threadIdx.x] = mine;
    for (unsigned half = 128; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    __syncthreads();
    return partial[0];
  }
  __device__ void sync() const { __syncthreads(); }
};

}  // namespace kv

#define KV_REGISTER(Type)                            \
  static_assert(::kv::detail::check_policy<Type>()); \
  [[maybe_unused]] const auto kernel_of_##Type = &::kv::hook_kernel<Type>

#include "policies/policy.hpp"

namespace kv {

/// What one head hands to hook_kernel; all pointers are device memory, slots as in HeadView.
template <class P>
struct HookCall {
  HeadView<typename P::Slot, typename P::HeadState> head;
  Observation seen;  // the block's attention
  Fold* folds;       // [slots] plans, for every slot that is not kept
};

/// Appends all slots, observes, scores, plans the merges of slots that are not kept and takes them out, for one head
/// per thread block of 256.
template <class P>
__global__ void hook_kernel(const P policy, HookCall<P>* calls) {
  HookCall<P>& call = calls[blockIdx.x];
  auto& head = call.head;
  const BlockTeam team;
  const auto view = [&](int s) {
    return SlotView<typename P::Slot>{head.state(s), head.info(),          head.token(s),
                                      head.now(),    head.multiplicity(s), head.probe_ ? head.probe(s) : 0.f};
  };
  if constexpr (detail::declares_on_append<P>) {
    if (threadIdx.x == 0)
      for (int s = 0; s < head.size(); ++s) policy.on_append(RowTeam{}, head, s);
    team.sync();
  }
  if constexpr (detail::declares_on_attention<P>)
    team.for_each(head.size(), [&](int s) {
      policy.on_attention(view(s), Observed{call.seen.sums + s * call.seen.group, call.seen.rows, call.seen.group});
    });
  team.sync();
  if constexpr (detail::declares_on_compress<P>) policy.on_compress(team, head);
  if constexpr (detail::declares_score<P>)
    team.for_each(head.size(), [&](int s) { head.score(s) = policy.score(view(s)); });
  if constexpr (detail::declares_score_in<P>)
    team.for_each(head.size(), [&](int s) { head.score(s) = policy.score_in(head, s); });
  team.sync();
  if constexpr (detail::declares_on_merge<P>) {
    team.for_each(head.size(), [&](int s) {
      if (!head.kept(s)) call.folds[s] = policy.on_merge(head, s);
    });
    team.sync();
    if constexpr (detail::declares_on_fold<P>)
      if (threadIdx.x == 0)
        for (int s = 0; s < head.size(); ++s)
          if (!head.kept(s) && call.folds[s].target >= 0)
            policy.on_fold(head.state(call.folds[s].target), head.state(s));
  }
  if constexpr (detail::declares_on_evict<P>)
    if (threadIdx.x == 0)
      for (int s = 0; s < head.size(); ++s)
        if (!head.kept(s)) policy.on_evict(RowTeam{}, head, s);
}

}  // namespace kv
