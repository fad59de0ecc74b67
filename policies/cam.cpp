// CaM, cache merging: a host policy names the victim; with a probability that grows with its attention its value is
// spread evenly over the next kept slots, its key goes (merge-methods 3). Decode only: the prompt is the host's plain
// eviction.
#include "policies/policy.hpp"

namespace {

struct CaM : kv::Policy {
  static constexpr kv::PolicyDoc doc{"cam", "CaM", "Zhang et al. 2024, ICML",
                                     "spreads the value of an attended victim over the next kept slots"};
  enum class Host { streaming_llm, h2o } host = Host::streaming_llm;
  enum class Gate { sample, expected, threshold } gate = Gate::expected;
  int sinks = 4, targets = 32;
  double recent = 0.5;
  bool merge = true;
  void describe(auto& field) {
    field("host", host, kv::Choices{"streaming_llm", "h2o"}, "who is evicted");
    field("sinks", sinks, kv::Range{0, 1 << 20}, "host streaming_llm: first tokens that always stay");
    field("recent", recent, kv::Range{0, 1}, "host h2o: share of the budget kept for the newest tokens");
    field("targets", targets, kv::Range{1, 1 << 20}, "kept slots after the victim that share its value");
    field("gate", gate, kv::Choices{"sample", "expected", "threshold"},
          "merge with probability p = attention / that of the targets; p of the value; all of it if p >= 1/2");
    field("merge", merge, "false: the host alone");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group
  };
  static constexpr const char* fold_note = "gate";

  KV_HD kv::Traits traits() const { return {.merges = merge}; }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD float score(auto slot) const {
    if (host == Host::h2o) return slot.recent(kv::share_of(recent, slot.budget())) ? kv::protect : slot.state.mass;
    if (slot.token < sinks) return kv::sink;
    const int newest = slot.budget() > sinks ? slot.budget() - sinks : 1;
    return slot.recent(newest) ? kv::protect : static_cast<float>(slot.token);
  }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    if (head.phase() == kv::Phase::prompt) return {};
    int first = -1, count = 0;
    float mass = 0;
    for (int s = head.next(victim); s >= 0 && count < targets; s = head.next(s))
      if (head.kept(s)) first = count == 0 ? s : first, mass += head.state(s).mass, ++count;
    const float mine = head.state(victim).mass;
    if (count == 0 || mine <= 0) return {};
    const float ratio = mine * static_cast<float>(count) / mass, p = ratio < 1 ? ratio : 1.f;
    const float draw = kv::uniform(head.info().seed, head.info().layer, head.info().kv_head, head.token(victim));
    const float share = gate == Gate::expected ? p : gate == Gate::threshold ? p >= 0.5f : draw < p;
    if (share == 0) return {};
    return {.target = first, .value = share / static_cast<float>(count), .spread = count, .note = p};
  }
  KV_HD void on_target(auto&, int, kv::FoldTarget& sum) const { sum.value_divisor = 1; }  // values add up
};
KV_REGISTER(CaM);

}  // namespace
