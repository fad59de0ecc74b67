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

  struct Scratch {
    float vote = 0;  // of the group on the slot at a place, not pooled yet
  };

  KV_HD kv::Traits traits() const { return {.observation_window = window, .window_once = true}; }
  KV_HD void on_compress(auto team, auto& head) const {
    const bool voting = head.phase() == kv::Phase::prompt || head.compressions() == 0;
    const int prefix = voting ? places_before(head, head.now() - window + 1) : 0;
    if (prefix > 0 && order == Order::group_then_pool) {
      team.for_each(head.size(), [&](int s) {
        const auto seen = head.seen(s);
        head.scratch(head.place(s)).vote = reduce(group, head.info().group, [&](int g) { return seen[g]; });
      });
      team.sync();
    }
    team.for_each(head.size(), [&](int place) {
      const int s = head.at(place);
      if (place < prefix) head.state(s).vote = pooled(head, place, prefix);
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
  /// How many slots hold tokens before `start`: the first places.
  KV_HD static int places_before(auto& head, int start) {
    int low = 0, high = head.size();
    while (low < high) {
      const int middle = (low + high) / 2;
      if (head.token(head.at(middle)) < start)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  KV_HD float pooled(auto& head, int place, int prefix) const {  // beyond the prefix: votes of 0
    const auto pool_of = [&](auto vote) {
      return reduce(pool, kernel, [&](int k) {
        const int voter = place + k - kernel / 2;
        return voter >= 0 && voter < prefix ? vote(voter) : 0.f;
      });
    };
    if (order == Order::group_then_pool) return pool_of([&](int voter) { return head.scratch(voter).vote; });
    return reduce(group, head.info().group,
                  [&](int g) { return pool_of([&](int voter) { return head.seen(head.at(voter))[g]; }); });
  }
};
KV_REGISTER(SnapKV);

}  // namespace
