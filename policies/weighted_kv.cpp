// WeightedKV: keys are low-rank and can go, values are not and must stay. The token with the smallest average attention
// loses its key, and its value joins its right neighbour's, weighted by their averages.
#include "policies/policy.hpp"

namespace {

struct WeightedKV : kv::Policy {
  static constexpr kv::PolicyDoc doc{
      "weighted_kv", "WeightedKV", "Yuan et al. 2025, arXiv:2503.01330",
      "drops the key of the least attended token and folds its value into the next slot"};
  static constexpr kv::Published published{.block = {1}};
  int sinks = 4;
  double managed = 0.5;
  bool merge = true;
  void describe(auto& field) {
    field("sinks", sinks, kv::Range{0, 1 << 20}, "first tokens that always stay");
    field("managed", managed, kv::Range{0, 1},
          "share of the budget that scores manage; the rest is sinks and the newest tokens");
    field("merge", merge, "false: the same victims, values dropped as well");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group; not inherited by a merge
  };

  KV_HD kv::Traits traits() const { return {.merges = merge, .one_at_a_time = true}; }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD float score(auto slot) const {
    if (slot.token < sinks) return kv::sink;
    const int recent = slot.budget() - sinks - kv::share_of(managed, slot.budget());
    return slot.recent(recent > 1 ? recent : 1) ? kv::protect : slot.state.mass / static_cast<float>(slot.age() + 1);
  }
  KV_HD kv::ValueFold on_merge(auto& head, int victim) const {
    const int to = head.next(victim);
    if (to < 0) return {};
    const float a = average(head, victim), b = average(head, to);
    return a + b > 0 ? kv::ValueFold{.target = to, .value = a, .own_value = b}
                     : kv::ValueFold{.target = to, .value = 1, .own_value = 1};
  }

 private:
  KV_HD float average(auto& head, int slot) const {
    return head.state(slot).mass / static_cast<float>(head.age(slot) + 1);
  }
};
KV_REGISTER(WeightedKV);

}  // namespace
