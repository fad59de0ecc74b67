// KVMerger: runs of like adjacent keys become one slot at their most attended member, by a Gaussian (merge-methods 2).
#include "policies/policy.hpp"

namespace {

struct KVMerger : kv::Policy {
  static constexpr kv::PolicyDoc doc{"kv_merger", "KVMerger", "Wang et al. 2024, arXiv:2407.08454",
                                     "joins runs of similar adjacent keys, weighted by a Gaussian around the pivot"};
  static constexpr kv::Published published{.compress = kv::Compress::prompt};
  enum class Sigma { mean_distance, fixed, literal } sigma = Sigma::mean_distance;
  enum class ValueScale { set_size, none } value_scale = ValueScale::none;
  double threshold = NAN, sigma_value = 5, recent = 0.34, heavy = 0.24;
  bool count_bias = true, merge = true;
  void describe(auto& field) {
    field("threshold", threshold, kv::RangeOr{-1, 2, "exact"},
          "join neighbours of a higher cosine; exact: the budget's");
    field("sigma", sigma, kv::Choices{"mean_distance", "fixed", "literal"},
          "width of the Gaussian: mean distance to the pivot / sqrt 2; sigma_value; the printed fixed point");
    field("sigma_value", sigma_value, kv::Range{1e-6, 1e6}, "of sigma: fixed");
    field("value_scale", value_scale, kv::Choices{"set_size", "none"}, "values times their set's size, as printed");
    field("count_bias", count_bias, "a slot counts as all its tokens in the softmax");
    field("recent", recent, kv::Range{0, 1}, "share of the budget (without one: of the slots) for the newest tokens");
    field("heavy", heavy, kv::Range{0, 1}, "the same for the most attended ones");
    field("merge", merge, "false: only the pivots of the same sets stay, nothing is folded");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group
  };
  struct Scratch {
    float safe = 0, first = 0, sigma = 0;
  };
  static constexpr const char* fold_note = "sigma";

  KV_HD kv::Traits traits() const {
    return {.merges = merge,
            .select = kv::Select::links,
            .picks = kv::Picks::fold,
            .every_link_below = threshold == threshold ? static_cast<float>(-threshold) : -INFINITY};
  }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD float log_bias(auto slot) const { return merge && count_bias ? slot.log_multiplicity() : 0.f; }
  KV_HD void on_compress(auto team, auto& head) const {
    const int whole = threshold == threshold ? head.size() : head.budget();
    const int newest = kv::share_of(recent, whole), most = kv::share_of(heavy, whole);
    const auto mass = [&](int s) { return head.state(s).mass; };
    const kv::Cut heaviest = kv::best_slots(team, head, most, mass);
    team.for_each(head.size(),
                  [&](int s) { head.scratch(s).safe = head.age(s) < newest || heaviest.has(mass(s), head.token(s)); });
    team.sync();
    team.for_each(head.size(), [&](int s) {
      const int to = head.next(s);
      const bool free = to >= 0 && !head.scratch(s).safe && !head.scratch(to).safe;
      head.score(s) = free ? -kv::RowTeam{}.cosine(head.key(s), head.key(to)) : kv::protect;
    });
  }
  KV_HD void on_selected(auto team, auto& head) const {
    const auto starts_a_run = [&](int s) {
      return head.kept(s) && head.next(s) >= 0 && head.target(head.next(s)) == s;
    };
    team.for_each(head.size(), [&](int s) { head.scratch(s).first = starts_a_run(s); });
    team.sync();
    team.for_each(head.size(), [&](int s) {
      if (head.scratch(s).first) settle_run(head, s);
    });
  }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    const int pivot = head.target(victim);
    const float own = static_cast<float>(head.multiplicity(pivot)), width = head.scratch(pivot).sigma;
    const float near = gauss(kv::RowTeam{}.distance(head.key(pivot), head.key(victim)), width);
    const float weight = near * static_cast<float>(head.multiplicity(victim));
    kv::Fold plan{.target = pivot, .key = weight, .value = weight, .own_key = own, .own_value = own, .note = width};
    if (value_scale == ValueScale::set_size) plan.value = near, plan.own_value = 1;  // stored values are sums already
    return plan;
  }
  KV_HD void on_target(auto&, int, kv::FoldTarget& sum) const {
    if (value_scale == ValueScale::set_size) sum.value_divisor = sum.key_divisor / static_cast<float>(sum.multiplicity);
  }

 private:
  KV_HD static float gauss(float d, float width) { return d > 0 ? kv::exp(-d * d / (2 * width * width)) : 1.f; }
  /// Moves a run to its pivot, the most attended member, and finds its Gaussian's width.
  KV_HD void settle_run(auto& head, int first) const {
    int pivot = first, size = 0;
    head.for_run(first, [&](int s) { pivot = head.state(s).mass > head.state(pivot).mass ? s : pivot, ++size; });
    const auto mean = [&](auto f) {  // over the run, of f(distance to the pivot), / sqrt 2
      float sum = 0;
      head.for_run(first, [&](int s) { sum += f(kv::RowTeam{}.distance(head.key(pivot), head.key(s))); });
      return sum / (1.41421356f * static_cast<float>(size));
    };
    float width = sigma == Sigma::literal ? 0.70710678f : static_cast<float>(sigma_value);
    if (sigma == Sigma::mean_distance) width = mean([](float d) { return d; });
    for (int i = 0; i < 200 && sigma == Sigma::literal; ++i) width = mean([&](float d) { return gauss(d, width); });
    head.scratch(pivot).sigma = width;
    head.settle(first, pivot);
  }
};
KV_REGISTER(KVMerger);

}  // namespace
