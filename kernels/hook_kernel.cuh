// A policy's hooks as device code: one thread block per KV head runs every hook once over a cache in device memory. It
// shows that a policy file compiles for the GPU unchanged, and gives parity tests the hooks' results on equal inputs.
#pragma once
#include "kernels/device_hooks.hpp"
#include "kernels/launch.cuh"
#include "kernels/team.cuh"
#include "policies/policy.hpp"

namespace kv {

/// What a kernel leaves behind, all in device memory; see HookOutputs.
struct DeviceOutputs {
  float* bias;
  Fold* folds;
  FoldTarget* sums;
  float* weights;
};

/// A target as on_target meets it: one victim of a quarter of its weight.
KV_HD inline FoldTarget sample_target(int multiplicity) {
  FoldTarget sum;
  sum.victims = 1, sum.multiplicity = multiplicity + 1;
  sum.key = sum.value = 0.25f, sum.extra = 0.5f, sum.key_divisor = sum.value_divisor = 1.25f;
  return sum;
}

/// All hooks once, in the order of a compression: one thread block of 256 for one head. `sight.seen` is the block's
/// attention, and the window's or the probe's for policies that ask for one.
template <class P>
__global__ void hook_kernel(const P policy, HeadView<typename P::Slot, typename P::HeadState, typename P::Scratch> head,
                            const Sight sight, const DeviceOutputs out) {
  __shared__ TeamMemory memory;
  const BlockTeam team{&memory};
  const Traits traits = policy.traits();
  const auto view = [&](int s, float probe, const Observed& seen = {}) {
    return SlotView<typename P::Slot>{head.state(s),        head.info(), head.token(s), head.now(),
                                      head.multiplicity(s), probe,       seen};
  };
  team.for_each(head.size(),
                [&](int s) { head.state(s) = typename P::Slot{}, head.scratch(s) = typename P::Scratch{}; });
  if (threadIdx.x == 0) head.shared() = typename P::HeadState{};
  team.sync();
  if constexpr (detail::declares_on_append<P>) {
    if (threadIdx.x == 0)
      for (int s = 0; s < head.size(); ++s) policy.on_append(RowTeam{}, head, s);
    team.sync();
  }
  const Observation& seen = sight.seen;
  if constexpr (detail::declares_on_attention<P>)
    team.for_each(head.size(), [&](int s) {
      policy.on_attention(view(s, 0), Observed{seen.sums + s * seen.group, seen.rows, seen.group});
    });
  if (traits.key_probe)
    team.for_each(head.size(), [&](int s) {
      head.probe_[s] = RowTeam{}.dot(head.key(s), {head.vector(), head.info().key_dim});
    });
  team.sync();
  head.sight_ = sight;
  if constexpr (detail::declares_on_probe<P>) policy.on_probe(team, head);
  team.sync();
  if constexpr (detail::declares_on_compress<P>) policy.on_compress(team, head);
  if constexpr (detail::declares_score<P>)
    team.for_each(head.size(), [&](int s) {
      head.score(s) = policy.score(view(s, traits.key_probe ? head.probe(s) : 0, head.seen(s)));
    });
  if constexpr (detail::declares_score_in<P>)
    team.for_each(head.size(), [&](int s) { head.score(s) = policy.score_in(head, s); });
  if constexpr (detail::declares_log_bias<P>)
    team.for_each(head.size(), [&](int s) { out.bias[s] = policy.log_bias(view(s, 0)); });
  team.sync();
  if constexpr (detail::declares_on_selected<P>) policy.on_selected(team, head);
  team.sync();
  if constexpr (detail::declares_on_merge<P>)
    team.for_each(head.size(), [&](int s) {
      if (!head.kept(s)) out.folds[s] = policy.on_merge(head, s);
    });
  team.for_each(head.size(), [&](int s) { out.sums[s] = sample_target(head.multiplicity(s)); });
  if constexpr (detail::declares_on_target<P>)
    team.for_each(head.size(), [&](int s) { policy.on_target(head, s, out.sums[s]); });
  if constexpr (detail::declares_key_weight<P>)
    team.for_each(head.size(), [&](int s) { out.weights[s] = policy.key_weight(head, s, 0); });
  team.sync();
  if constexpr (detail::declares_on_fold<P>)
    if (threadIdx.x == 0)
      for (int s = 0; s < head.size(); ++s)
        if (!head.kept(s) && out.folds[s].target >= 0)
          policy.on_fold(head.state(out.folds[s].target), head.state(s), out.folds[s]);
  if constexpr (detail::declares_on_evict<P>)
    if (threadIdx.x == 0)
      for (int s = 0; s < head.size(); ++s)
        if (!head.kept(s)) policy.on_evict(RowTeam{}, head, s);
}

/// run_hooks_on_device for one policy type.
template <class P>
HookOutputs run_hooks(const HookInputs& in) {
  const auto slots = static_cast<std::size_t>(in.slots());
  const Buffer<HeadInfo> info(std::vector{in.head});
  const Buffer<float> keys(in.keys), values(in.values), sums(in.sums), similarity(in.similarity),
      future(in.future_mass), gradient(in.key_gradient), mean(in.query_mean), covariance(in.query_covariance),
      norm(in.output_norm);
  const Buffer<int> token(in.token), multiplicity(in.multiplicity), order(in.order), rank(in.rank), target(in.target);
  const Buffer<std::uint8_t> kept(in.kept);
  const Buffer<typename P::Slot> states(slots);
  const Buffer<typename P::Scratch> scratch(slots);
  const Buffer<typename P::HeadState> shared(1);
  const std::vector<float> zeros(slots);
  const Buffer<float> vector{std::vector<float>(static_cast<std::size_t>(in.head.key_dim))},
      value_vector{std::vector<float>(static_cast<std::size_t>(in.head.value_dim))}, probe(slots), score(slots),
      bias(zeros), weights(zeros);
  const Buffer<Fold> folds{std::vector<Fold>(slots)};
  const Buffer<FoldTarget> targets(slots);
  HeadView<typename P::Slot, typename P::HeadState, typename P::Scratch> head;
  head.info_ = info.data(), head.moment_ = in.moment, head.size_ = in.slots();
  head.keys_ = keys.data(), head.values_ = values.data();
  head.token_ = token.data(), head.multiplicity_ = multiplicity.data(), head.order_ = order.data(),
  head.rank_ = rank.data();
  head.state_ = states.data(), head.head_state_ = shared.data(), head.scratch_ = scratch.data();
  head.vector_ = vector.data(), head.value_vector_ = value_vector.data();
  head.probe_ = probe.data(), head.score_ = score.data();
  Sight sight{{sums.data(), in.rows, in.head.group}};
  sight.kept = kept.data(), sight.target = target.data(), sight.similarity = similarity.data();
  sight.key_gradient = gradient.data(), sight.query_mean = mean.data(), sight.query_covariance = covariance.data();
  sight.future_mass = future.data(), sight.output_norm = norm.data();
  P policy;
  for (const Field& field : fields_of(policy))
    for (const auto& [name, value] : in.parameters)
      if (field.name == name) field.set(value);
  launch(hook_kernel<P>, 1, 256, 0, nullptr, policy, head, sight,
         DeviceOutputs{bias.data(), folds.data(), targets.data(), weights.data()});
  KV_CUDA_TRY(cudaDeviceSynchronize());
  return {score.to_host(), bias.to_host(), folds.to_host(), targets.to_host(), weights.to_host()};
}

}  // namespace kv
