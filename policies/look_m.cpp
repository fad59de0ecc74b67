// LOOK-M in its text form: every victim of H2O joins its most similar kept key, whatever the similarity (merge-methods
// 5.3).
#include "policies/policy.hpp"

namespace {

struct LookM : kv::Policy {
  static constexpr kv::PolicyDoc doc{"look_m", "LOOK-M (text)", "Wan et al. 2024, arXiv:2406.18139",
                                     "H2O whose victims all join the most similar kept key"};
  static constexpr kv::Published published{.compress = kv::Compress::prompt};
  enum class Rule { pivot, average, weighted } rule = Rule::pivot;
  double recent = 0.5;
  bool merge = true;
  void describe(auto& field) {
    field("recent", recent, kv::Range{0, 1}, "share of the budget kept for the newest tokens");
    field("rule", rule, kv::Choices{"pivot", "average", "weighted"},
          "a victim counts as half itself and half its target; as itself; as itself times the cosine");
    field("merge", merge, "false: H2O");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group; not inherited by a merge
  };

  KV_HD kv::Traits traits() const {
    return {.merges = merge, .nearest = merge ? kv::Nearest::cosine : kv::Nearest::none};
  }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD float score(auto slot) const {
    return slot.recent(kv::share_of(recent, slot.budget())) ? kv::protect : slot.state.mass;
  }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    const float weight = rule == Rule::pivot ? 0.5f : rule == Rule::average ? 1.f : head.similarity(victim);
    return {.target = head.target(victim), .key = weight, .value = weight};
  }
  KV_HD void on_target(auto&, int, kv::FoldTarget& sum) const {
    const auto n = static_cast<float>(sum.victims);
    if (rule == Rule::pivot) sum.own_key = sum.own_value = 1 + n / 2;
    sum.key_divisor = sum.value_divisor = 1 + n;
  }
};
KV_REGISTER(LookM);

}  // namespace
