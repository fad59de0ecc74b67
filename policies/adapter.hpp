// Runs a policy's hooks on the CPU: HeadProgram for any policy type, by loops over slots.
#pragma once
#include <span>
#include <vector>

#include "policies/policy.hpp"

namespace kv {

template <class P>
class HeadProgramOf final : public HeadProgram {
 public:
  HeadProgramOf(const P& policy, const HeadInfo& info) : policy_(policy), traits_(policy.traits()), info_(info) {
    if (traits_.key_probe) vector_.resize(static_cast<std::size_t>(info.key_dim));
  }

  void append(const Cache& cache, const Moment& moment, int first) override {
    states_.resize(static_cast<std::size_t>(cache.size()));
    if constexpr (detail::declares_on_append<P>) {
      Head head = view(cache, moment);
      for (int s = first; s < cache.size(); ++s) policy_.on_append(RowTeam{}, head, s);
    }
  }

  void weigh(const float* probability, const float* logit, int n, int rows_after, double* sums) const override {
    (void)logit, (void)rows_after;  // unused without the policy's own weigh
    for (int s = 0; s < n; ++s) {
      if constexpr (!detail::declares_weigh<P>)
        sums[s] += static_cast<double>(probability[s]);
      else if (logit[s] > -INFINITY)  // the query sees this slot
        sums[s] += static_cast<double>(P::weigh(probability[s], logit[s], rows_after));
    }
  }

  void observe(const Cache& cache, const Moment& moment, const Observation& seen) override {
    if constexpr (detail::declares_on_attention<P>) {
      Head head = view(cache, moment);
      head.seen_ = seen;
      for (int s = 0; s < cache.size(); ++s) policy_.on_attention(slot(head, s, 0), head.seen(s));
    }
  }

  void score(const Cache& cache, const Moment& moment, const Observation& seen, std::span<float> score) override {
    Head head = view(cache, moment);
    head.seen_ = seen;
    head.score_ = score.data();
    if (traits_.key_probe) {
      probe_.resize(static_cast<std::size_t>(cache.size()));
      for (int s = 0; s < cache.size(); ++s)
        probe_[static_cast<std::size_t>(s)] = RowTeam{}.dot(head.key(s), {vector_.data(), info_.key_dim});
      head.probe_ = probe_.data();
    }
    if constexpr (detail::declares_on_compress<P>) {
      policy_.on_compress(HostTeam{}, head);
    } else {
      for (int s = 0; s < cache.size(); ++s) {
        if constexpr (detail::declares_score<P>)
          head.score(s) = policy_.score(slot(head, s, traits_.key_probe ? head.probe(s) : 0));
        else
          head.score(s) = policy_.score_in(head, s);
      }
    }
  }

  Fold merge(const Cache& cache, const Moment& moment, std::span<const std::uint8_t> kept, int victim) override {
    if constexpr (detail::declares_on_merge<P>) {
      Head head = view(cache, moment);
      head.kept_ = kept.data();
      return policy_.on_merge(head, victim);
    }
    return {};
  }

  void fold(const Fold& plan, int from) override {
    if constexpr (detail::declares_on_fold<P>)
      policy_.on_fold(states_[static_cast<std::size_t>(plan.target)], states_[static_cast<std::size_t>(from)], plan);
    else
      (void)plan, (void)from;
  }

  void evict(const Cache& cache, const Moment& moment, int slot) override {
    if constexpr (detail::declares_on_evict<P>) {
      Head head = view(cache, moment);
      policy_.on_evict(RowTeam{}, head, slot);
    }
  }

  void move(int from, int to) override {
    states_[static_cast<std::size_t>(to)] = states_[static_cast<std::size_t>(from)];
  }
  void resize(int size) override { states_.resize(static_cast<std::size_t>(size)); }

 private:
  using Slot = typename P::Slot;
  using Head = HeadView<Slot, typename P::HeadState>;

  Head view(const Cache& cache, const Moment& moment) {
    Head head = view_of<Slot, typename P::HeadState>(info_, moment, cache);
    head.state_ = states_.data(), head.head_state_ = &head_state_;
    if (traits_.key_probe) head.vector_ = vector_.data();
    return head;
  }
  SlotView<Slot> slot(const Head& head, int s, float probe) const {
    return {head.state(s), info_, head.token(s), head.now(), head.multiplicity(s), probe};
  }

  P policy_;
  Traits traits_;
  HeadInfo info_;
  std::vector<Slot> states_;  // [slots]
  typename P::HeadState head_state_{};
  std::vector<float> vector_, probe_;
};

template <class P>
class BoundPolicyOf final : public BoundPolicy {
 public:
  std::vector<Field> fields() override { return fields_of(policy_); }
  Traits traits() const override { return policy_.traits(); }
  std::unique_ptr<HeadProgram> bind(const HeadInfo& head) const override {
    return std::make_unique<HeadProgramOf<P>>(policy_, head);
  }

 private:
  P policy_;
};

/// The catalogue entry of a policy type.
template <class P>
PolicyEntry entry_of(const char* file) {
  PolicyEntry entry;
  entry.doc = P::doc;
  entry.published = P::published;
  entry.merges = detail::declares_on_merge<P>;
  entry.observes = detail::declares_on_attention<P>;
  entry.slot_state_bytes = std::is_empty_v<typename P::Slot> ? 0 : sizeof(typename P::Slot);
  entry.head_state_bytes = std::is_empty_v<typename P::HeadState> ? 0 : sizeof(typename P::HeadState);
  entry.file = file;
  entry.make = [] { return std::make_unique<BoundPolicyOf<P>>(); };
  return entry;
}

}  // namespace kv
