// Runs a policy's hooks on the CPU: HeadProgram for any policy type, by loops over slots.
#pragma once
#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "policies/policy.hpp"

namespace kv {

template <class P>
class HeadProgramOf final : public HeadProgram {
 public:
  HeadProgramOf(const P& policy, const HeadInfo& info) : policy_(policy), traits_(policy.traits()), info_(info) {
    if (traits_.key_probe) vector_.resize(static_cast<std::size_t>(info.key_dim));
    if (traits_.value_vector) value_vector_.resize(static_cast<std::size_t>(info.value_dim));
  }

  void append(const Cache& cache, const Moment& moment, int first) override {
    states_.resize(static_cast<std::size_t>(cache.size()));
    if constexpr (detail::declares_on_append<P>) {
      Head head = view(cache, moment);
      for (int s = first; s < cache.size(); ++s) policy_.on_append(RowTeam{}, head, s);
    }
  }

  void set_budget(int budget) override { info_.budget = budget; }

  void weigh(const float* probability, const float* logit, int n, int rows_after, bool window,
             double* sums) const override {
    if constexpr (detail::declares_weigh_window<P>)
      if (window)
        return add(probability, logit, n, sums, [&](float p, float l) { return P::weigh_window(p, l, rows_after); });
    (void)window;
    if constexpr (detail::declares_weigh<P>) {
      add(probability, logit, n, sums, [&](float p, float l) { return P::weigh(p, l, rows_after); });
    } else {
      (void)logit, (void)rows_after;
      for (int s = 0; s < n; ++s) sums[s] += static_cast<double>(probability[s]);
    }
  }

  void observe(const Cache& cache, const Moment& moment, const Sight& sight) override {
    if constexpr (detail::declares_on_attention<P>) {
      Head head = view(cache, moment, sight);
      for (int s = 0; s < cache.size(); ++s) policy_.on_attention(slot(head, s), head.seen(s));
    }
  }

  void probe(const Cache& cache, const Moment& moment, const Sight& sight) override {
    scratch_.resize(static_cast<std::size_t>(cache.size()));
    if constexpr (detail::declares_on_probe<P>) {
      Head head = view(cache, moment, sight);
      policy_.on_probe(HostTeam{}, head);
    }
  }

  void log_bias(const Cache& cache, const Moment& moment, std::span<float> bias) override {
    std::fill(bias.begin(), bias.end(), 0.f);
    if constexpr (detail::declares_log_bias<P>) {
      const Head head = view(cache, moment);
      const auto known = static_cast<int>(states_.size());  // a probed block's slots have no state yet, and no bias
      for (int s = 0; s < std::min(known, cache.size()); ++s)
        bias[static_cast<std::size_t>(s)] = policy_.log_bias(slot(head, s));
    }
  }

  bool receives(const Cache& cache, const Moment& moment, int s) override {
    if constexpr (detail::declares_receives<P>) return policy_.receives(slot(view(cache, moment), s));
    return true;
  }

  void score(const Cache& cache, const Moment& moment, const Sight& sight, std::span<float> score) override {
    scratch_.resize(static_cast<std::size_t>(cache.size()));
    Head head = view(cache, moment, sight);
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
          head.score(s) = policy_.score(scored_slot(head, s));
        else
          head.score(s) = policy_.score_in(head, s);
      }
    }
  }

  void selected(const Cache& cache, const Moment& moment, const Sight& sight) override {
    if constexpr (detail::declares_on_selected<P>) {
      Head head = view(cache, moment, sight);
      policy_.on_selected(HostTeam{}, head);
    }
  }

  Fold merge(const Cache& cache, const Moment& moment, const Sight& sight, int victim) override {
    if constexpr (detail::declares_on_merge<P>) {
      Head head = view(cache, moment, sight);
      return policy_.on_merge(head, victim);
    }
    return {};
  }

  void target(const Cache& cache, const Moment& moment, const Sight& sight, int s, FoldTarget& sum) override {
    if constexpr (detail::declares_on_target<P>) {
      Head head = view(cache, moment, sight);
      policy_.on_target(head, s, sum);
    }
  }

  void key_weights(const Cache& cache, const Moment& moment, const Sight& sight, int s,
                   std::span<float> weight) override {
    std::fill(weight.begin(), weight.end(), 0.f);
    if constexpr (detail::declares_key_weight<P>) {
      Head head = view(cache, moment, sight);
      for (std::size_t c = 0; c < weight.size(); ++c) weight[c] = policy_.key_weight(head, s, static_cast<int>(c));
    }
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
  using Head = HeadView<Slot, typename P::HeadState, typename P::Scratch>;

  Head view(const Cache& cache, const Moment& moment, const Sight& sight = {}) {
    Head head = view_of<Slot, typename P::HeadState, typename P::Scratch>(info_, moment, cache);
    head.state_ = states_.data(), head.head_state_ = &head_state_, head.scratch_ = scratch_.data();
    if (traits_.key_probe) head.vector_ = vector_.data();
    if (traits_.value_vector) head.value_vector_ = value_vector_.data();
    head.sight_ = sight;
    return head;
  }
  /// Adds what the policy's own `weigh` makes of every slot that the query sees.
  template <class F>
  static void add(const float* probability, const float* logit, int n, double* sums, F weigh) {
    for (int s = 0; s < n; ++s)
      if (logit[s] > -INFINITY) sums[s] += static_cast<double>(weigh(probability[s], logit[s]));
  }
  SlotView<Slot> slot(const Head& head, int s) const {
    return {head.state(s), info_, head.token(s), head.now(), head.multiplicity(s), 0};
  }
  /// The same with what is known while scoring.
  SlotView<Slot> scored_slot(const Head& head, int s) const {
    SlotView<Slot> view = slot(head, s);
    if (traits_.key_probe) view.probe = head.probe(s);
    if (head.sight_.seen.sums) view.seen_ = head.seen(s);
    return view;
  }

  P policy_;
  Traits traits_;
  HeadInfo info_;
  std::vector<Slot> states_;  // [slots]
  typename P::HeadState head_state_{};
  std::vector<typename P::Scratch> scratch_;  // [slots]
  std::vector<float> vector_, value_vector_, probe_;
};

template <class P>
class BoundPolicyOf final : public BoundPolicy {
 public:
  std::vector<Field> fields() override { return fields_of(policy_); }
  std::vector<std::pair<std::string, Value>> values() const override {
    P copy = policy_;
    std::vector<std::pair<std::string, Value>> all;
    for (const Field& field : fields_of(copy)) all.emplace_back(field.name, field.get());
    return all;
  }
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
  entry.biases = detail::declares_log_bias<P>;
  entry.weighs_channels = detail::declares_key_weight<P>;
  if constexpr (requires { P::fold_note; }) entry.fold_note = P::fold_note;
  entry.slot_state_bytes = std::is_empty_v<typename P::Slot> ? 0 : sizeof(typename P::Slot);
  entry.head_state_bytes = std::is_empty_v<typename P::HeadState> ? 0 : sizeof(typename P::HeadState);
  entry.file = file;
  entry.make = [] { return std::make_unique<BoundPolicyOf<P>>(); };
  return entry;
}

}  // namespace kv
