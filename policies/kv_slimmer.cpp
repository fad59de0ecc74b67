// KVSlimmer: as AsymKV, but keys are weighted by attention mass times value deviation: (H11 + H12) k1 + (H12 + H22) k2 with
// |c11|, |c22|, |c12| for second derivatives (kvslimmer-asymkv 3). `released`: the authors' code (L1, value sums, a bound for
// |c12|); `paper`: L2 on value sums; `consistent`: L2 on the mean values that slots stand for.
#include "policies/adjacent_links.hpp"

namespace {

struct KVSlimmer : kv::AdjacentLinks {
  static constexpr kv::PolicyDoc doc{"kv_slimmer", "KVSlimmer", "2026, arXiv:2603.00907",
                                     "joins adjacent slots; keys weighted by attention mass and value deviation"};
  enum class Rule { released, paper, consistent } rule = Rule::consistent;
  enum class Guard { none, clamp } guard = Guard::clamp;
  bool smoothing = false;
  void describe(auto& field) {
    field("rule", rule, kv::Choices{"released", "paper", "consistent"}, "the authors' code; the paper; on mean values");
    describe_links(field);
    field("smoothing", smoothing, "average deviations over the blocks so far, as released");
    field("guard", guard, kv::Choices{"none", "clamp"}, "key weights as they come (released), or kept in [0, 1]");
  }
  struct Slot {
    float h = NAN;  // |c11|: alpha (1 - 2 alpha) |v - o|, smoothed; NaN before the first probe
  };
  struct Scratch : AdjacentLinks::Scratch {
    float alpha = 0;  // share of the mass of all slots that may join
  };
  static constexpr const char* fold_note = "h12_over_h1";

  KV_HD kv::Traits traits() const {
    kv::Traits traits = link_traits();
    traits.value_vector = true, traits.keeps_state = smoothing;
    if (smoothing) traits.probe = kv::Probe::always;
    return traits;
  }
  KV_HD void on_probe(auto team, auto& head) const {
    AdjacentLinks::on_probe(team, head);
    const auto mass = [&](int s) { return head.place(s) < first_place(head) ? 0.f : head.scratch(s).mass; };
    const float total = team.sum(head.size(), [&](int place) { return mass(head.at(place)); }) + 1e-21f;
    team.for_each_read(head.size(), mass, [&](int s, float mine) { head.scratch(s).alpha = mine / total; });
    team.sync();
    const auto value = [&](int s) { return head.value(s); };
    const auto times = [&](int s) { return scale(head, s); };
    float* o = head.value_vector();  // sum alpha v
    team.add_rows(
        head, value, [&](int s) { return head.scratch(s).alpha * times(s); }, o, head.info().value_dim);
    team.sync();
    const float share = 1 / static_cast<float>(head.block());  // of this block, by its number
    team.distances(head, value, times, o, rule == Rule::released, [&](int s, float deviation) {
      const float alpha = head.scratch(s).alpha, h = alpha * (1 - 2 * alpha) * deviation, old = head.state(s).h;
      const float raw = rule == Rule::released ? h : std::abs(h);
      head.state(s).h = smoothing && old == old ? share * raw + (1 - share) * old : raw;
    });
  }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    kv::Fold plan = link_fold(head, victim);
    const float a1 = head.scratch(plan.target).alpha, a2 = head.scratch(victim).alpha, *o = head.value_vector();
    const float h1 = head.state(plan.target).h, h2 = head.state(victim).h;
    plan.own_key = a1 + 1e-21f, plan.key = a2 + 1e-21f;  // picks fold: a left fold in which mass accumulates
    if (picks == kv::Picks::fold) return plan;
    const float times1 = scale(head, plan.target), times2 = scale(head, victim);
    const auto both = [&](int c, float v1, float v2) { return v1 * times1 + v2 * times2 - 2 * o[c]; };
    const auto deviation = [](float a, float h) { return h / (a * (1 - 2 * a) + 1e-21f); };
    const float h12 = a1 * a2 *
                      (rule == Rule::released ? deviation(a1, h1) + deviation(a2, h2)
                                              : norm(both, head.value(plan.target), head.value(victim)));
    plan.own_key = h1 - h12, plan.key = h2 - h12, plan.note = h12 / h1;
    if (guard == Guard::none) return plan;
    const float sum = plan.own_key + plan.key, a = std::abs(sum) <= 1e-21f ? 0.5f : plan.own_key / sum;
    plan.own_key = a < 0 ? 0.f : a > 1 ? 1.f : a, plan.key = 1 - plan.own_key;
    return plan;
  }
  KV_HD void on_target(auto& head, int target, kv::FoldTarget& sum) const {
    AdjacentLinks::on_target(head, target, sum);
    if (guard == Guard::none && picks != kv::Picks::fold) sum.key_divisor += 1e-21f;
  }
  KV_HD void on_fold(Slot& into, const Slot& from, const kv::Fold& plan) const {
    const float sum = plan.own_key + plan.key + 1e-21f, a = plan.own_key / sum, b = plan.key / sum;
    into.h = a * a * into.h + b * b * from.h;
  }

 private:
  /// What makes a value the sum of those that it stands for.
  KV_HD float scale(auto& head, int s) const {
    return rule == Rule::consistent ? 1.f : static_cast<float>(head.multiplicity(s));
  }
};
KV_REGISTER(KVSlimmer);

struct KVSlimmerReleased : KVSlimmer {
  static constexpr kv::PolicyDoc doc{"kv_slimmer_released", "KVSlimmer (released code)", "2026, arXiv:2603.00907",
                                     "kv_slimmer as the authors' code runs: tokens are lost where picks overlap"};
  KVSlimmerReleased() {
    rule = Rule::released, picks = kv::Picks::faithful, clip = 5, smoothing = true, guard = Guard::none;
  }
};
KV_REGISTER(KVSlimmerReleased);

}  // namespace
