// ZSMerge: beside the best and the newest tokens a few residual slots gather the rest, counting their tokens in the
// softmax with a damped bias (merge-methods 5.5).
#include "policies/policy.hpp"

namespace {

struct ZSMerge : kv::Policy {
  static constexpr kv::PolicyDoc doc{"zsmerge", "ZSMerge", "Liu et al. 2025, arXiv:2503.10714",
                                     "keeps the best and the newest; the rest joins a few residual slots"};
  double tail = 0.4, decay = 0.98, bias = 0.6;
  int dense = 1;
  bool merge = true;
  void describe(auto& field) {
    field("tail", tail, kv::Range{0, 1}, "share of the budget kept for the newest tokens");
    field("dense", dense, kv::Range{1, 1 << 20}, "residual slots");
    field("decay", decay, kv::Range{0, 1}, "of scores, at each decode step");
    field("bias", bias, kv::Range{0, 1}, "of log counts in the softmax");
    field("merge", merge, "false: the same victims, dropped");
  }
  struct Slot {
    float mass = 0;
    int residual = 0;
  };
  struct HeadState {
    int started = 0;
  };
  struct Scratch {
    int anchor = -1;  // residual slot of the first compression
  };

  KV_HD kv::Traits traits() const { return {.merges = merge, .nearest = merge ? kv::Nearest::dot : kv::Nearest::none}; }
  KV_HD void on_attention(auto slot, auto seen) const {
    const bool decoding = slot.now >= slot.head.prompt_tokens;
    slot.state.mass = slot.state.mass * (decoding ? static_cast<float>(decay) : 1.f) + seen.mean();
  }
  KV_HD float log_bias(auto slot) const { return merge ? static_cast<float>(bias) * slot.log_multiplicity() : 0.f; }
  KV_HD bool receives(auto slot) const { return slot.state.residual != 0; }
  KV_HD void on_compress(auto team, auto& head) const {
    const int gatherers = dense < head.budget() ? dense : head.budget();
    const int share = kv::share_of(tail, head.budget()), room = head.budget() - gatherers;
    const int newest = share < room ? share : room;
    const bool begins = head.shared().started == 0;
    if (begins) {
      found_residuals(team, head, gatherers, newest);
      team.sync();
    }
    team.for_each(head.size(), [&](int s) {
      if (!begins) head.scratch(s).anchor = -1;
      const bool safe = head.state(s).residual || head.age(s) < newest;
      head.score(s) = safe ? kv::protect : head.state(s).mass;
    });
    if (!begins) return;
    team.sync();
    team.for_each(1, [&](int) { head.shared().started = 1; });
  }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    const int anchor = head.scratch(victim).anchor;  // it may have to go itself, when too much is protected
    const int to = anchor >= 0 && head.kept(anchor) ? anchor : head.target(victim);
    if (to < 0) return {};
    const auto from = static_cast<float>(head.multiplicity(victim)), own = static_cast<float>(head.multiplicity(to));
    return {.target = to, .key = from, .value = from, .own_key = own, .own_value = own};
  }
  KV_HD void on_fold(Slot& into, const Slot& from, const kv::Fold&) const {
    into.mass = from.mass > into.mass ? from.mass : into.mass;
  }

 private:
  /// The first compression: what is neither best nor newest is cut, in token order, into runs; each run's first slot
  /// becomes residual and the anchor of the run.
  KV_HD void found_residuals(auto team, auto& head, int gatherers, int newest) const {
    const int top = head.budget() - gatherers - newest, rest = head.size() - newest - top;
    const auto mass = [&](int s) { return head.age(s) < newest ? -1.f : head.state(s).mass; };
    const kv::Cut best = kv::best_slots(team, head, top, mass);
    team.for_each(1, [&](int) {
      int run = 0, anchor = -1, left = 0;
      for (int place = 0; place < head.size(); ++place) {
        const int s = head.at(place);
        head.scratch(s).anchor = -1;
        if (head.age(s) < newest || best.has(mass(s), head.token(s))) continue;
        if (left == 0) anchor = s, left = rest / gatherers + (run++ < rest % gatherers), head.state(s).residual = 1;
        head.scratch(s).anchor = anchor, --left;
      }
    });
  }
};
KV_REGISTER(ZSMerge);

}  // namespace
