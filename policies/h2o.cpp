// H2O, heavy-hitter oracle: the tokens that received the most attention so far, and the newest ones.
#include "policies/policy.hpp"

namespace {

struct H2O : kv::Policy {
  static constexpr kv::PolicyDoc doc{"h2o", "H2O", "Zhang et al. 2023, arXiv:2306.14048",
                                     "keeps heavy hitters (most accumulated attention) and the newest tokens"};
  enum class Score { sum, mean_visible, decode_only };
  double recent = 0.5;
  Score by = Score::sum;
  void describe(auto& field) {
    field("recent", recent, kv::Range{0, 1}, "share of the budget kept for the newest tokens");
    field("score", by, kv::Choices{"sum", "mean_visible", "decode_only"},
          "attention summed over all queries, divided by the queries that could see the token, or of decode queries "
          "only");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group
  };

  KV_HD kv::Traits traits() const { return {.observes_prompt = by != Score::decode_only}; }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD float score(auto slot) const {
    if (slot.recent(kv::share_of(recent, slot.budget()))) return kv::protect;
    return by == Score::mean_visible ? slot.state.mass / static_cast<float>(slot.age() + 1) : slot.state.mass;
  }
};
KV_REGISTER(H2O);

}  // namespace
