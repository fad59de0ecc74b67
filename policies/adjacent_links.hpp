// What KVSlimmer, AsymKV and their control share: the mass of slots under an incoming block's queries, the links that
// it scores, and values that stand for all their tokens (kvslimmer-asymkv 2.3, 2.5 and 3.4).
#pragma once
#include "policies/policy.hpp"

namespace kv {

struct AdjacentLinks : Policy {
  static constexpr Published published{.block = {512}, .compress = Compress::prompt, .positions = Positions::span};
  Picks picks = Picks::disjoint;
  int sinks = 32, clip = 0;
  double decay_tokens = 656.586543053466;  // 4096 / ln 512
  bool merge = true;
  void describe_links(auto& field) {
    field("picks", picks, Choices{"disjoint", "faithful", "fold"},
          "the lowest links that share no slot, in rounds; the lowest at once, losing tokens where they overlap "
          "(released); the lowest at once, a run becoming one slot whose key is weighted by mass");
    field("sinks", sinks, Range{0, 1 << 20}, "first slots that never join");
    field("decay_tokens", decay_tokens, Range{0, 1e9},
          "the links of newer slots join earlier by exp(-slots / this); 0 = off");
    field("clip", clip, Range{0, 1 << 20}, "the most tokens that a slot counts as (released: 5); 0 = no limit");
    field("merge", merge, "false: the same links' right slots are dropped, nothing is folded");
  }
  struct Scratch {
    float mass = 0;  // probability that the block's queries give the slot, mean over the group
  };

  KV_HD Traits link_traits() const {
    return {.scope = Scope::layer,
            .merges = merge,
            .select = Select::links,
            .picks = picks,
            .probe = Probe::due,
            .clip = clip};
  }
  KV_HD int first_place(auto& head) const { return sinks < head.budget() ? sinks : head.budget() - 1; }
  KV_HD void on_probe(auto team, auto& head) const {
    const int heads = head.info().group;
    team.for_each_read(
        head.size(), [](int) { return 0.f; }, heads, [&](int s, int g) { return head.seen(s)[g]; },
        [](float& sum, float seen) { sum += seen; },
        [&](int s, float sum) { head.scratch(s).mass = sum / static_cast<float>(heads); });
    team.sync();
  }
  KV_HD float score_in(auto& head, int slot) const {
    const int place = head.place(slot) - first_place(head), next = head.next(slot);
    if (place < 0 || next < 0) return kv::sink;
    const float mass = head.scratch(slot).mass + head.scratch(next).mass;
    return decay_tokens > 0 ? mass * kv::exp(static_cast<float>(-(place + 1) / decay_tokens)) : mass;
  }
  KV_HD float log_bias(auto slot) const { return merge ? slot.log_multiplicity() : 0.f; }
  /// The plan whose value is the mean over all tokens; key weights are the policy's.
  KV_HD Fold link_fold(auto& head, int victim) const {
    const int to = head.target(victim);
    return {.target = to,
            .value = static_cast<float>(head.multiplicity(victim)),
            .own_value = static_cast<float>(head.multiplicity(to))};
  }
  /// Norm of entry(channel, the rows' values).
  static KV_HD float norm(auto entry, auto row, auto... others) {
    float squares = 0;
    const auto add = [&](int first, int count, const auto&... values) {
      for (int k = 0; k < 8; ++k)
        if (k < count) {
          const float x = entry(first + k, values[k]...);
          squares += x * x;
        }
    };
    row.each_eight(add, others...);
    return std::sqrt(squares);
  }
  /// A clipped slot counts as fewer tokens than its value sums.
  KV_HD void on_target(auto&, int, FoldTarget& sum) const {
    if (clip > 0 && sum.multiplicity > clip) sum.value_divisor = static_cast<float>(clip);
  }
};

}  // namespace kv
