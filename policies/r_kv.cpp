// R-KV, for long reasoning: what the last queries look at, less what other keys say again; in decode only now and then
// (eviction-methods 3.16).
#include "policies/policy.hpp"

namespace {

struct RKV : kv::Policy {
  static constexpr kv::PolicyDoc doc{"r_kv", "R-KV", "Cai et al. 2025, arXiv:2505.24133",
                                     "keeps important keys that are not redundant, and the last queries' tokens"};
  int window = 8, kernel = 7, interval = 128;
  double lambda = 0.07, similarity = 0.5;
  void describe(auto& field) {
    field("window", window, kv::Range{1, 4096}, "last queries that vote; their tokens stay");
    field("kernel", kernel, kv::Range{1, 255}, "width of the max-pooling over neighbouring slots");
    field("lambda", lambda, kv::Range{0, 1}, "weight of importance; 1 - lambda is that of redundancy");
    field("similarity", similarity, kv::Range{-1, 1},
          "cosine above which the newest of two like keys is no redundancy");
    field("interval", interval, kv::Range{1, 1 << 20}, "decode tokens between compressions");
  }
  struct Scratch {
    float inverse_norm = 0, redundancy = 0;
    int spared = 0;  // the newest slot that is like this one
  };

  KV_HD kv::Traits traits() const { return {.observation_window = window, .window_past = true, .interval = interval}; }
  KV_HD void on_compress(auto team, auto& head) const {
    const int n = head.size();
    const kv::RowTeam row{};
    const auto cosine = [&](int i, int j) {
      return row.dot(head.key(i), head.key(j)) * head.scratch(i).inverse_norm * head.scratch(j).inverse_norm;
    };
    team.for_each(
        n, [&](int s) { head.scratch(s).inverse_norm = 1 / (std::sqrt(row.dot(head.key(s), head.key(s))) + 1e-8f); });
    team.sync();
    team.for_each(n, [&](int i) {
      head.scratch(i).spared = head.at(0);  // when none is like it, as in the authors' code
      for (int place = n - 1; place >= 0; --place) {
        const int j = head.at(place);
        if (j == i || !(cosine(i, j) > static_cast<float>(similarity))) continue;
        head.scratch(i).spared = j;
        break;
      }
    });
    team.sync();
    team.for_each(n, [&](int j) {
      float sum = 0;
      for (int place = 0; place < n; ++place) {
        const int i = head.at(place);
        if (i != j && head.scratch(i).spared != j) sum += cosine(i, j);
      }
      head.scratch(j).redundancy = sum / static_cast<float>(n);
    });
    team.sync();
    const float most = team.max(n, [&](int s) { return head.scratch(s).redundancy; });
    const float total = team.sum(n, [&](int i) { return kv::exp(head.scratch(head.at(i)).redundancy - most); });
    team.for_each(n, [&](int s) {
      const float r = kv::exp(head.scratch(s).redundancy - most) / total, weight = static_cast<float>(lambda);
      head.score(s) = head.age(s) < window ? kv::protect : weight * importance(head, s) - (1 - weight) * r;
    });
  }

 private:
  /// Mean over the window's queries, the largest of the group and of the neighbours before the window.
  KV_HD float importance(auto& head, int slot) const {
    float best = 0;
    for (int k = -(kernel / 2); k < kernel - kernel / 2; ++k) {
      const int s = head.neighbour(slot, k);
      if (s >= 0 && head.age(s) >= window && head.seen(s).max() > best) best = head.seen(s).max();
    }
    return best / static_cast<float>(head.seen(slot).rows());
  }
};
KV_REGISTER(RKV);

}  // namespace
