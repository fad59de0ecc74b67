// D2O, dynamic discriminative operations (token level): what H2O evicts joins its most similar kept key if it is
// similar enough; the threshold follows the mean similarity of the victims (merge-methods 4, uniform layer budgets).
#include "policies/policy.hpp"

namespace {

struct D2O : kv::Policy {
  static constexpr kv::PolicyDoc doc{"d2o", "D2O", "Wan et al. 2024, arXiv:2406.13035",
                                     "H2O whose victims join the most similar kept key when similar enough"};
  enum class Weights { softmax, code } weights = Weights::softmax;
  double recent = 0.25, alpha = 0.5, beta = 0.5;
  int sinks = 4;
  bool merge = true;
  void describe(auto& field) {
    field("recent", recent, kv::Range{0, 1}, "share of the budget kept for the newest tokens");
    field("weights", weights, kv::Choices{"softmax", "code"},
          "softmax of cosines (paper), or cosines over counts (code)");
    field("alpha", alpha, kv::Range{0, 1e6}, "how much of the threshold stays");
    field("beta", beta, kv::Range{0, 1e6}, "how much of the victims' mean similarity enters it");
    field("sinks", sinks, kv::Range{0, 1 << 20}, "first tokens that always stay");
    field("merge", merge, "false: H2O with sinks");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group; not inherited by a merge
  };
  struct HeadState {
    float threshold = NAN;  // until the first compression
  };
  static constexpr const char* fold_note = "cosine";

  KV_HD kv::Traits traits() const {
    return {.merges = merge, .nearest = merge ? kv::Nearest::cosine : kv::Nearest::none};
  }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD float score(auto slot) const {
    if (slot.token < sinks) return kv::sink;
    return slot.recent(kv::share_of(recent, slot.budget())) ? kv::protect : slot.state.mass;
  }
  KV_HD void on_selected(auto team, auto& head) const {
    if (!merge) return;
    const auto of_victims = [&](auto f) {
      return team.sum(head.size(), [&](int place) { return head.kept(head.at(place)) ? 0.f : f(head.at(place)); });
    };
    const float victims = of_victims([](int) { return 1.f; });
    const float mean = of_victims([&](int s) { return head.similarity(s); }) / victims;
    team.for_each(1, [&](int) {
      float& threshold = head.shared().threshold;
      const bool known = threshold == threshold;
      threshold = known ? static_cast<float>(alpha * threshold + beta * mean) : mean;
    });
  }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    const float u = head.similarity(victim);
    if (!(u >= head.shared().threshold)) return {};
    const bool exponential = weights == Weights::softmax;
    const float weight = exponential ? kv::exp(u) : u, own = exponential ? kv::exp(1.f) : 1.f;
    return {.target = head.target(victim), .key = weight, .value = weight, .own_key = own, .own_value = own, .note = u};
  }
  KV_HD void on_target(auto&, int, kv::FoldTarget& sum) const {
    if (weights == Weights::code) sum.key_divisor = sum.value_divisor = static_cast<float>(1 + sum.victims);
  }
};
KV_REGISTER(D2O);

}  // namespace
