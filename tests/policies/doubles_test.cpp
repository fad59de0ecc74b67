// Policies written to check what the engine promises to hooks. They are registered in this test program only, so the
// property suite runs them as well.
#include <gtest/gtest.h>
#include <unistd.h>

#include "core/error.hpp"
#include "core/replay.hpp"
#include "policies/policy.hpp"
#include "tests/synthetic.hpp"

namespace {

/// Scores NaN, which the engine refuses, unless every slot was weighed once by every query that could see it: all since
/// it came, or the 25 of a sliding window.
struct CountsItsQueries : kv::Policy {
  static constexpr kv::PolicyDoc doc{"counts_its_queries", "-", "-", "NaN unless a slot saw age + 1 queries"};
  struct Slot {
    float rows = 0;
  };
  KV_HD static float weigh(float, float, int) { return 1; }
  KV_HD void on_attention(auto slot, auto seen) const { slot.state.rows += seen.mean(); }
  KV_HD float score(auto slot) const {
    const auto all = static_cast<float>(slot.age() + 1), rows = slot.state.rows;
    return rows == all || (rows == 25 && all > 25) ? rows : NAN;
  }
};
KV_REGISTER(CountsItsQueries);

/// Keeps the even tokens, folding each odd one into its left neighbour with equal weights.
struct MergesLeft : kv::Policy {
  static constexpr kv::PolicyDoc doc{"merges_left", "-", "-", "folds keys and values to the left, all at once"};
  struct Slot {
    int folded = 0;
  };
  KV_HD void on_append(auto, auto& head, int slot) const { head.state(slot).folded = 0; }
  KV_HD float score(auto slot) const { return slot.token % 2 == 0 ? 1.f : 0.f; }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    const int to = head.neighbour(victim, -1);
    return to < 0 || !head.kept(to) ? kv::Fold{} : kv::Fold{.target = to, .key = 1, .value = 1};
  }
  KV_HD void on_fold(Slot& into, const Slot& from, const kv::Fold&) const { into.folded += from.folded + 1; }
};
KV_REGISTER(MergesLeft);

/// The probe is the sum of the keys' own dot products: known while scoring, never stale.
struct Probes : kv::Policy {
  static constexpr kv::PolicyDoc doc{"probes", "-", "-", "reads the key probe while scoring and while observing"};
  struct Slot {
    float before = 0;
  };
  KV_HD kv::Traits traits() const { return {.key_probe = true}; }
  KV_HD void on_append(auto row, auto& head, int slot) const { row.add(head.vector(), 1, head.key(slot)); }
  KV_HD void on_evict(auto row, auto& head, int slot) const { row.add(head.vector(), -1, head.key(slot)); }
  KV_HD void on_attention(auto slot, auto) const { slot.state.before = slot.probe; }
  KV_HD float score(auto slot) const { return slot.state.before == 0 ? slot.probe : NAN; }
};
KV_REGISTER(Probes);

/// Reads attention that it never asked for.
struct AsksForNothing : kv::Policy {
  static constexpr kv::PolicyDoc doc{"asks_for_nothing", "-", "-", "-"};
  KV_HD float score_in(auto& head, int slot) const { return head.seen(slot).mean(); }
};
struct SlotAsksForNothing : kv::Policy {
  static constexpr kv::PolicyDoc doc{"slot_asks_for_nothing", "-", "-", "-"};
  KV_HD float score(auto slot) const { return slot.seen().mean(); }
};
/// Leaves a slot without a score.
struct ForgetsASlot : kv::Policy {
  static constexpr kv::PolicyDoc doc{"forgets_a_slot", "-", "-", "-"};
  KV_HD void on_compress(auto team, auto& head) const {
    team.for_each(head.size() - 1, [&](int s) { head.score(s) = 1; });
  }
};
/// Folds a victim into itself.
struct FoldsIntoItself : kv::Policy {
  static constexpr kv::PolicyDoc doc{"folds_into_itself", "-", "-", "-"};
  KV_HD float score(auto slot) const { return static_cast<float>(slot.token); }
  KV_HD kv::Fold on_merge(auto&, int victim) const { return {.target = victim, .value = 1}; }
};

/// What the engine says when `P` replays a small trace.
template <class P>
std::string complaint() {
  static_assert(kv::detail::check_policy<P>());
  kv::Session session(kv::test::write_trace("double", {.layers = 1}, 3));
  kv::ReplaySettings settings;
  settings.budget = 10, settings.measured = {59};
  try {
    kv::replay(session, kv::entry_of<P>("-"), kv::BoundPolicyOf<P>(), settings);
  } catch (const kv::InternalError& error) {
    std::filesystem::remove(session.header().file);
    return error.what();
  }
  std::filesystem::remove(session.header().file);
  return "";
}

TEST(Doubles, AHookThatReadsWhatItDidNotAskForIsToldSo) {
  EXPECT_NE(complaint<AsksForNothing>().find("head.seen() needs the trait observation_window"), std::string::npos);
  EXPECT_NE(complaint<SlotAsksForNothing>().find("slot.seen() needs the trait observation_window"), std::string::npos);
}

TEST(Doubles, AForgottenScoreIsFound) {
  const std::string says = complaint<ForgetsASlot>();
  EXPECT_NE(says.find("forgets_a_slot scored NaN: layer 0, KV head "), std::string::npos) << says;
}

TEST(Doubles, AnImpossibleMergeNamesItsPolicy) {
  const std::string says = complaint<FoldsIntoItself>();
  EXPECT_NE(says.find("folds_into_itself planned a merge that cannot be: layer 0"), std::string::npos) << says;
}

TEST(Doubles, OutputsThatAreNotFiniteAreAnError) {
  kv::Session session(
      kv::test::write_trace("huge", {.dtype = kv::Dtype::float32, .rope = false}, 4, [](int, kv::LayerTensors& t) {
        for (float& x : t.q) x *= 1e25f;
        for (float& x : t.k) x *= 1e25f;
      }));
  kv::ReplaySettings settings;
  settings.budget = 10, settings.measured = {59};
  const std::string name = "knorm";
  const kv::PolicyEntry& entry = kv::find_policy(name);
  try {
    kv::replay(session, entry, *entry.make(), settings);
    FAIL() << "NaN must not pass for a result";
  } catch (const kv::TraceError& error) {
    EXPECT_NE(std::string(error.what()).find("is not finite"), std::string::npos) << error.what();
  }
  std::filesystem::remove(session.header().file);
}

}  // namespace
