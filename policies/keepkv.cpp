// KeepKV: what H2O evicts joins its most similar kept key so that the present query's output does not change: slots
// carry votes (log votes enter the softmax), and the merged key is stretched to keep the summed attention
// (merge-methods 5.1). The paper averages attention over past steps with constants that it does not print; this is its
// exact one-step form.
#include "policies/policy.hpp"

namespace {

struct KeepKV : kv::Policy {
  static constexpr kv::PolicyDoc doc{"keepkv", "KeepKV", "Tian et al. 2025, arXiv:2504.09936",
                                     "H2O whose victims join similar kept keys, keeping the present output"};
  enum class Host { h2o } host = Host::h2o;
  double recent = 0.5, threshold = 0.8;
  bool merge = true;
  void describe(auto& field) {
    field("host", host, kv::Choices{"h2o"}, "who is evicted");
    field("recent", recent, kv::Range{0, 1}, "share of the budget kept for the newest tokens");
    field("threshold", threshold, kv::Range{-1, 1}, "cosine that a victim and its target must exceed");
    field("merge", merge, "false: H2O");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group; not inherited by a merge
  };

  KV_HD kv::Traits traits() const {
    return {.observation_window = 1, .merges = merge, .nearest = merge ? kv::Nearest::cosine : kv::Nearest::none};
  }
  /// What the last query's row gives: its logit z, so that exp(z) is the unnormalised attention s of the paper.
  KV_HD static float weigh_window(float, float logit, int) { return logit; }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD float score(auto slot) const {
    return slot.recent(kv::share_of(recent, slot.budget())) ? kv::protect : slot.state.mass;
  }
  KV_HD float log_bias(auto slot) const { return merge ? slot.log_multiplicity() : 0.f; }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    if (!(head.similarity(victim) > static_cast<float>(threshold))) return {};
    const int to = head.target(victim);
    // w = votes x exp(z), both times exp(-z of the target): only ratios matter, and nothing overflows. What the query
    // cannot see has next to no weight.
    const float z = head.seen(victim).mean(), more = z - base(head, to);
    const float s = head.visible(victim) ? kv::exp(more < 60 ? more : 60.f) : 1e-30f;
    const float w = static_cast<float>(head.multiplicity(victim)) * s;
    const float own = static_cast<float>(head.multiplicity(to)) * (head.visible(to) ? 1.f : 1e-30f);
    return {.target = to, .key = w, .value = w, .own_key = own, .own_value = own, .extra = w * z};
  }
  KV_HD void on_target(auto& head, int target, kv::FoldTarget& sum) const {
    const float z = base(head, target), total = sum.own_value + sum.value;
    const float mean_z = (sum.own_value * z + sum.extra) / total;
    const float stretch = (kv::log(total / static_cast<float>(sum.multiplicity)) + z) / mean_z;
    if (stretch >= 0.9f && stretch <= 1.1f) sum.key_divisor = total / stretch;  // else singular: the convex key
  }

 private:
  KV_HD static float base(auto& head, int target) { return head.visible(target) ? head.seen(target).mean() : 0.f; }
};
KV_REGISTER(KeepKV);

}  // namespace
