// CriticalKV: half of the budget by a base score; the rest by that score times what the value becomes after W_o
// (eviction-methods 3.13).
#include "policies/policy.hpp"

namespace {

struct CriticalKV : kv::Policy {
  static constexpr kv::PolicyDoc doc{"critical_kv", "CriticalKV", "Feng et al. 2025, arXiv:2502.03805",
                                     "half by a base score, half by score times the size of W_o v"};
  static constexpr kv::Published published{.compress = kv::Compress::prompt};
  enum class Base { snapkv, h2o } base = Base::snapkv;
  double share = 0.5;
  void describe(auto& field) {
    field("base", base, kv::Choices{"snapkv", "h2o"},
          "the score: a window's votes, or accumulated attention; its window stays");
    field("share", share, kv::Range{0, 1}, "of the budget that the base score alone decides");
  }
  struct Slot {
    float mass = 0;  // attention received so far, mean over the group
  };
  struct Scratch {
    float score = 0;
    int safe = 0;
  };
  static constexpr int window = 32, kernel = 7;  // as published with SnapKV

  KV_HD kv::Traits traits() const {
    return {.observation_window = base == Base::snapkv ? window : 0,
            .observes = base == Base::h2o,
            .keeps_state = base == Base::h2o,
            .output_norm = true};
  }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.mass += seen.mean(); }
  KV_HD void on_compress(auto team, auto& head) const {
    const int n = head.size(), newest = base == Base::snapkv ? window : head.budget() / 2;
    team.for_each(n, [&](int s) {
      head.scratch(s).safe = head.age(s) < newest;
      head.scratch(s).score = base == Base::h2o ? head.state(s).mass : head.scratch(s).safe ? 0.f : votes(head, s);
    });
    team.sync();
    const auto safe = static_cast<int>(team.sum(n, [&](int s) { return static_cast<float>(head.scratch(s).safe); }));
    const auto base_score = [&](int s) { return head.scratch(s).safe ? -1.f : head.scratch(s).score; };
    const kv::Cut first = kv::best_slots(team, head, kv::share_of(share, head.budget()) - safe, base_score);
    team.for_each(n, [&](int s) {
      const bool stays = head.scratch(s).safe || first.has(base_score(s), head.token(s));
      head.score(s) = stays ? kv::protect : (base_score(s) + 1e-4f) * head.output_norm(s);
    });
  }

 private:
  /// Mean over the window's queries and the group, averaged over neighbours in the prefix (zeros beyond it).
  KV_HD float votes(auto& head, int slot) const {
    float sum = 0;
    for (int k = -(kernel / 2); k <= kernel / 2; ++k) {
      const int s = head.neighbour(slot, k);
      if (s >= 0 && head.age(s) >= window) sum += head.seen(s).mean() / static_cast<float>(head.seen(s).rows());
    }
    return sum / kernel;
  }
};
KV_REGISTER(CriticalKV);

}  // namespace
