// SnapKV: the last queries of the prompt vote for the prefix; pooling over neighbours keeps runs of tokens. The budget
// includes the window. Votes are final once decode has begun.
#include "policies/policy.hpp"

namespace {

struct SnapKV : kv::Policy {
  static constexpr kv::PolicyDoc doc{"snapkv", "SnapKV", "Li et al. 2024, arXiv:2404.14469",
                                     "keeps what the last window of queries attends to, pooled, and the window"};
  static constexpr kv::Published published{.compress = kv::Compress::prompt};
  enum class Reduce { mean, max };
  enum class Order { group_then_pool, pool_then_group };
  int window = 32, kernel = 7;
  Reduce pool = Reduce::mean, group = Reduce::mean;
  Order order = Order::group_then_pool;
  void describe(auto& field) {
    field("window", window, kv::Range{1, 4096}, "last queries that vote; their tokens stay");
    field("kernel", kernel, kv::Range{1, 255}, "width of the pooling over neighbouring slots");
    field("pool", pool, kv::Choices{"avg", "max"}, "average (zeros beyond the ends count) or maximum");
    field("group", group, kv::Choices{"mean", "max"}, "how the query heads of a group combine");
    field("order", order, kv::Choices{"group_then_pool", "pool_then_group"}, "which comes first");
  }
  struct Slot {
    float vote = kv::protect;  // until a compression finds the token before the window
  };

  KV_HD kv::Traits traits() const { return {.observation_window = window, .window_once = true}; }
  KV_HD void on_compress(auto team, auto& head) const {
    const bool voting = head.phase() == kv::Phase::prompt || head.compressions() == 0;
    const int start = head.now() - window + 1;
    team.for_each(head.size(), [&](int s) {
      if (voting && head.token(s) < start) head.state(s).vote = pooled(head, s, start);
      head.score(s) = head.state(s).vote;
    });
  }

 private:
  KV_HD static float reduce(Reduce how, int n, auto vote) {  // of n votes, none of them negative
    float sum = 0, best = 0;
    for (int i = 0; i < n; ++i) {
      const float x = vote(i);
      sum += x, best = x > best ? x : best;
    }
    return how == Reduce::mean ? sum / static_cast<float>(n) : best;
  }
  KV_HD float pooled(auto& head, int s, int start) const {
    const auto voter = [&](int k) {  // -1 beyond the prefix: a vote of 0
      const int t = head.neighbour(s, k - kernel / 2);
      return t >= 0 && head.token(t) < start ? t : -1;
    };
    const auto vote = [&](int t, int g) { return t >= 0 ? head.seen(t)[g] : 0.f; };
    const int heads = head.info().group;
    if (order == Order::group_then_pool)
      return reduce(pool, kernel, [&](int k) {
        const int t = voter(k);
        return reduce(group, heads, [&](int g) { return vote(t, g); });
      });
    return reduce(group, heads, [&](int g) { return reduce(pool, kernel, [&](int k) { return vote(voter(k), g); }); });
  }
};
KV_REGISTER(SnapKV);

}  // namespace
