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
    const int prefix = voting ? places_before(head, head.now() - window + 1) : 0, heads = head.info().group;
    const auto add = [](Votes& votes, float vote) { votes.add(vote); };
    const auto give = [&](int s, float vote) { head.state(s).vote = head.score(s) = vote; };
    if (order == Order::group_then_pool) {
      team.for_each_read(
          prefix > 0 ? head.size() : 0, [&](int s) { return Votes{head.place(s)}; }, heads,
          [&](int s, int g) { return head.seen(s)[g]; }, add,
          [&](int, const Votes& votes) { head.scratch(votes.at).vote = votes.reduced(group, heads); });
      team.sync();
      team.for_each_read(
          prefix, [&](int place) { return Votes{head.at(place)}; }, kernel,
          [&](int place, int k) {
            const int voter = place + k - kernel / 2;
            const bool votes = voter >= 0 && voter < prefix;
            const float vote = head.scratch(votes ? voter : place).vote;
            return votes ? vote : 0.f;
          },
          add, [&](int, const Votes& votes) { give(votes.at, votes.reduced(pool, kernel)); });
    } else {
      team.for_each(prefix, [&](int place) { give(head.at(place), pooled_then_grouped(head, place, prefix)); });
    }
    team.for_each_read(  // what has its vote already
        head.size() - prefix, [&](int i) { return head.at(prefix + i); },
        [&](int, int s) { head.score(s) = head.state(s).vote; });
  }

 private:
  struct Votes {  // none of them negative
    int at = 0;   // the place of the slot that gets them, or the slot of the place
    float sum = 0, best = 0;
    KV_HD void add(float vote) { sum += vote, best = vote > best ? vote : best; }
    KV_HD float reduced(Reduce how, int n) const { return how == Reduce::mean ? sum / static_cast<float>(n) : best; }
  };
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
  KV_HD float pooled_then_grouped(auto& head, int place, int prefix) const {
    Votes of_group;
    for (int g = 0; g < head.info().group; ++g) {
      Votes pooled;  // beyond the prefix: votes of 0
      for (int voter = place - kernel / 2; voter < place - kernel / 2 + kernel; ++voter)
        pooled.add(voter >= 0 && voter < prefix ? head.seen(head.at(voter))[g] : 0.f);
      of_group.add(pooled.reduced(pool, kernel));
    }
    return of_group.reduced(group, head.info().group);
  }
};
KV_REGISTER(SnapKV);

}  // namespace
