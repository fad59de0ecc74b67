// What must hold for every policy of the catalogue, at every corner of its parameters. A policy added to policies/ (or
// through KV_POLICIES) is tested here without an edit.
#include <fmt/core.h>
#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <unistd.h>

#include <set>

#include "core/error.hpp"
#include "core/metrics.hpp"
#include "tests/synthetic.hpp"

namespace kv {
namespace {

/// One policy at one corner: a parameter at an end of its range, the others at their defaults.
struct Corner {
  std::string policy, parameter;
  Value value;
};

void PrintTo(const Corner& c, std::ostream* out) { *out << c.policy << " " << c.parameter << "=" << to_text(c.value); }

std::vector<Value> corner_values(const Field& field) {
  if (field.type == "bool") return {true, false};
  if (field.type == "int") return {std::int64_t(field.low), std::int64_t(field.low + 3), std::int64_t(field.high)};
  if (field.type == "number") {
    std::vector<Value> values{field.low, field.high};
    values.insert(values.end(), field.choices.begin(), field.choices.end());
    return values;
  }
  return {field.choices.begin(), field.choices.end()};
}

std::vector<Corner> corners() {
  std::vector<Corner> all;
  for (const PolicyEntry& entry : policies()) {
    all.push_back({entry.doc.name, "", false});
    const auto policy = entry.make();
    for (const Field& field : policy->fields())
      for (const Value& value : corner_values(field)) all.push_back({entry.doc.name, field.name, value});
  }
  return all;
}

std::string name_of_corner(const testing::TestParamInfo<Corner>& info) {
  std::string name = info.param.policy +
                     (info.param.parameter.empty() ? "" : "_" + info.param.parameter + "_" + to_text(info.param.value));
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return fmt::format("{}_{}", name, info.index);
}

class Property : public testing::TestWithParam<Corner> {
 protected:
  Property() : entry(find_policy(GetParam().policy)), policy(entry.make()) {
    for (const Field& field : policy->fields())
      if (field.name == GetParam().parameter) field.set(GetParam().value);
  }
  static constexpr test::Shape shape{.window = 25, .softcap = 20, .sink_logit = true, .wo = true, .e = true};
  static Session& session() {
    static Session s(test::write_trace("property", shape, 1));
    return s;
  }
  ReplaySettings settings(int budget, int block, Compress compress = Compress::always,
                          Positions positions = Positions::absolute) const {
    ReplaySettings s;
    s.budget = needs_budget() ? budget : 60, s.block = {block}, s.positions = positions;
    s.compress = probes() ? Compress::prompt : compress;
    s.measured = parse_measure("all", 60, 40);
    return s;
  }
  ReplayResult run(const ReplaySettings& s) { return replay(session(), entry, *policy, s); }
  bool compresses() const { return policy->traits().compresses; }
  bool needs_budget() const { return policy->traits().needs_budget(); }
  bool probes() const { return policy->traits().probe != Probe::none; }
  /// Unguarded weights have poles, and a trace this small meets them: keys overflow.
  static bool unguarded() { return GetParam().parameter == "guard" && to_text(GetParam().value) == "none"; }

  /// False when the policy cannot do this by its nature (a ConfigError, checked elsewhere).
  bool possible(const ReplaySettings& s) const {
    try {
      check_point(session().header(), entry, *policy, s);
      return true;
    } catch (const ConfigError&) {
      return false;
    }
  }

  /// Slots of every head before a block that begins with token `first`.
  int held_before(int first, const ReplaySettings& s) const {
    if (!compresses()) return first;
    const auto bounded = [&](int n) { return std::min(n, s.budget); };
    if (probes()) {  // the last prompt block comes on top
      const int last_block = s.block.tokens == 0 ? 0 : (40 - 1) / s.block.tokens * s.block.tokens;
      return first < 40 ? bounded(first) : bounded(last_block) + first - last_block;
    }
    if (first <= 40) return bounded(first);
    const int decoded = first - 40, since = decoded % policy->traits().interval;
    if (s.compress == Compress::prompt || since == decoded) return bounded(40) + decoded;
    return bounded(std::min(bounded(40) + decoded - since, s.budget)) + since;
  }

  const PolicyEntry& entry;
  std::unique_ptr<BoundPolicy> policy;
};

/// Corners at the defaults only: for properties that a policy's own protection at an extreme may outweigh.
class Defaults : public Property {};

TEST_P(Property, HoldsAtMostTheBudgetAndWhatCameSince) {
  if (compresses() && !needs_budget()) GTEST_SKIP() << "the policy's own threshold decides how much stays";
  if (unguarded()) GTEST_SKIP() << "keys may overflow";
  int tried = 0;
  for (const int block : {0, 7, 1})
    for (const int budget : {1, 2, 5, 17, 39})
      for (const Compress compress : {Compress::prompt, Compress::always})
        for (const Positions positions : {Positions::absolute, Positions::cache, Positions::span}) {
          SCOPED_TRACE(fmt::format("block {} budget {} {} {}", block, budget, name_of(compress), name_of(positions)));
          const ReplaySettings s = settings(budget, block, compress, positions);
          if (!possible(s)) continue;
          ++tried;
          const ReplayResult r = run(s);
          const std::size_t steps = r.step_token.size();
          for (std::size_t i = 0; i < r.slots.size(); ++i) {
            const std::size_t step = i % steps;
            const int first = step == 0 ? 0 : r.step_token[step - 1] + 1, appended = r.step_token[step] + 1 - first;
            ASSERT_EQ(r.slots[i], held_before(first, s) + appended) << "step " << step;
            // A probing policy compresses before it appends: that is why the last slots of the prompt stay.
          }
          for (const int slots : r.final_slots) ASSERT_EQ(slots, held_before(60, s));
        }
  EXPECT_GT(tried, 0);
}

TEST_P(Property, KeptIsASortedSubsetAndTokensAddUp) {
  for (const int budget : {1, 6, 20}) {
    const ReplayResult r = run(settings(budget, 9));
    std::int64_t removed = 0;
    for (std::size_t h = 0; h < r.final_position.size(); ++h) {
      const auto& kept = r.final_position[h];
      ASSERT_TRUE(std::is_sorted(kept.begin(), kept.end()));
      ASSERT_EQ(std::set<std::int64_t>(kept.begin(), kept.end()).size(), kept.size());
      ASSERT_GE(kept.front(), 0);
      ASSERT_LT(kept.back(), 60);
      std::int64_t tokens = 0;
      for (const std::int64_t m : r.final_multiplicity[h]) {
        ASSERT_GE(m, 1);
        tokens += m;
      }
      ASSERT_LE(tokens, 60);
      removed += 60 - static_cast<std::int64_t>(kept.size());
    }
    EXPECT_EQ(r.evictions + r.merges, removed);
    EXPECT_EQ(r.compressions > 0, compresses());
  }
}

TEST_P(Property, BudgetOfAllTokensIsTheFullCache) {
  if (compresses() && !needs_budget()) GTEST_SKIP() << "the policy's own threshold decides how much stays";
  for (const int block : {0, 7, 1}) {
    const ReplayResult r = run(settings(60, block));
    EXPECT_EQ(r.evictions + r.merges + r.compressions, 0);
    EXPECT_LE(metrics_of(r).nmse.value(), 2e-6);
    EXPECT_LE(metrics_of(r).lost_mass.max.value(), 1e-5);
  }
}

TEST_P(Defaults, ProtectedTokensSurvive) {
  ReplaySettings s = settings(30, 7);
  s.protect = {2, 3};
  const ReplayResult r = run(s);
  for (const auto& kept : r.final_position)
    for (const std::int64_t token : {0, 1, 57, 58, 59})
      EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), token)) << token;
}

TEST_P(Defaults, ProtectingTheWholeBudgetLeavesNothingToScores) {
  const Traits traits = policy->traits();
  if (traits.select == Select::links) GTEST_SKIP() << "what is joined leaves a slot where it began, protected or not";
  if (traits.interval > 1) GTEST_SKIP() << "what came since the last compression is there as well";
  ReplaySettings s = settings(10, 7);
  s.protect = {4, 6};
  const auto streaming = find_policy("streaming_llm").make();
  const ReplayResult expected = replay(session(), find_policy("streaming_llm"), *streaming, settings(10, 7)),
                     got = run(s);
  EXPECT_TRUE(!compresses() || got.final_position == expected.final_position);
}

TEST_P(Property, SameBitsAgainAndForAnyNumberOfThreads) {
  const ReplaySettings s = settings(11, 7);
  const ReplayResult a = run(s);
  const tbb::global_control one(tbb::global_control::max_allowed_parallelism, 1);
  const ReplayResult b = run(s);
  EXPECT_EQ(a.error2, b.error2);
  EXPECT_EQ(a.lost_mass, b.lost_mass);
  EXPECT_EQ(a.final_position, b.final_position);
}

TEST_P(Property, HeadsAndLayersDoNotInfluenceEachOther) {
  if (policy->traits().scope == Scope::layer) GTEST_SKIP() << "heads share a selection by design";
  Session other(test::write_trace("edited", shape, 1, [&](int layer, LayerTensors& t) {
    const std::size_t head = t.k.size() / 2;  // another last head in layer 0, another layer 1
    for (std::size_t i = layer == 0 ? head : 0; i < t.k.size(); ++i) t.k[i] = -t.k[i];
  }));
  const ReplaySettings s = settings(11, 7);
  const ReplayResult a = run(s), b = replay(other, entry, *policy, s);
  std::filesystem::remove(other.header().file);
  EXPECT_EQ(a.final_position[0], b.final_position[0]);
  const auto of_head = static_cast<std::ptrdiff_t>(2 * s.measured.size());  // two query heads
  EXPECT_TRUE(std::equal(a.error2.begin(), a.error2.begin() + of_head, b.error2.begin()));
}

TEST_P(Property, AConstantValueFieldIsPreserved) {
  Session constant(test::write_trace("constant", {.wo = true, .e = true}, 2,
                                     [](int, LayerTensors& t) { std::fill(t.v.begin(), t.v.end(), 1.5f); }));
  const ReplayResult r = replay(constant, entry, *policy, settings(7, 9));
  std::filesystem::remove(constant.header().file);
  if (r.unbalanced > 0) GTEST_SKIP() << "the policy's value weights do not add up to 1";
  EXPECT_LE(metrics_of(r).rel_l2.max.value(), 1e-5);
}

TEST_P(Defaults, ScalingValuesChangesNoKeptSet) {
  Session doubled(test::write_trace("doubled", shape, 1, [](int, LayerTensors& t) {
    for (float& v : t.v) v *= 2;
  }));
  const ReplayResult r = replay(doubled, entry, *policy, settings(12, 7));
  std::filesystem::remove(doubled.header().file);
  EXPECT_EQ(r.final_position, run(settings(12, 7)).final_position);
}

TEST_P(Property, MetricsAreFiniteOrKeysAreSaidToOverflow) {
  for (const Positions positions : {Positions::absolute, Positions::cache, Positions::span}) {
    const ReplaySettings s = settings(3, 1, Compress::always, positions);
    if (!possible(s)) continue;
    ReplayResult r;
    try {
      r = run(s);
    } catch (const std::exception& error) {
      ASSERT_TRUE(unguarded()) << error.what();
      EXPECT_NE(std::string(error.what()).find("is not finite"), std::string::npos) << error.what();
      continue;
    }
    const Metrics m = metrics_of(r);
    EXPECT_TRUE(std::isfinite(m.nmse.value()));
    EXPECT_EQ(m.undefined_queries, 0);
    EXPECT_TRUE(std::isfinite(m.rel_l2_wo.value().max.value()));
    for (const double mass : r.lost_mass) EXPECT_TRUE(mass >= 0 && mass <= 1 + 1e-6) << mass;
  }
}

TEST_P(Property, TimedPassesRepeatTheCheckedOne) {
  ReplaySettings s = settings(11, 7);
  s.timing_repeats = 2;
  const ReplayResult r = run(s);  // throws when a timed pass keeps other slots
  ASSERT_EQ(r.us.size(), static_cast<std::size_t>(timed_phases));
  for (const auto& phase : r.us) {
    ASSERT_EQ(phase.size(), 20u);
    for (const double us : phase) EXPECT_TRUE(us >= 0 && us < 1e7);
  }
}

TEST_P(Defaults, AllocationsSpreadTheBudgetExactly) {
  if (!needs_budget() || probes() || policy->traits().interval > 1)
    GTEST_SKIP() << "holds more than its budget at the end";
  for (const Allocation::Kind kind : {Allocation::Kind::pyramid, Allocation::Kind::adaptive})
    for (const int budget : {1, 2, 9}) {
      ReplaySettings s = settings(budget, 7);
      s.allocation = {kind, 20, 0.2}, s.protect = {1, 2};
      if (!possible(s)) continue;
      const ReplayResult r = run(s);
      int layer0 = 0, all = 0;
      for (std::size_t h = 0; h < r.final_slots.size(); ++h) {
        EXPECT_GE(r.final_slots[h], 1);
        all += r.final_slots[h], layer0 += h < 2 ? r.final_slots[h] : 0;
        EXPECT_TRUE(r.final_slots[h] <= 2 || r.final_position[h].back() == 59) << "protected";
      }
      EXPECT_EQ(all, 4 * budget) << budget;
      EXPECT_TRUE(kind != Allocation::Kind::adaptive || layer0 == 2 * budget) << layer0;
    }
}

/// Merges that are plain weighted means preserve what all values share; these say that they are.
TEST(ConvexMerges, AddUpToOne) {
  for (const char* name :
       {"weighted_kv", "mean_merge", "asym_kv", "kv_slimmer", "kv_merger", "d2o", "keepkv", "look_m", "zsmerge"}) {
    const PolicyEntry& entry = find_policy(name);
    Session session(test::write_trace("convex", {.wo = true, .e = true}, 2));
    const auto policy = entry.make();
    for (const Field& field : policy->fields())
      if (field.type == "number" && field.name == "threshold" && field.choices.empty()) field.set(-1.0);  // merge all
    ReplaySettings s;
    s.budget = 12, s.block = {9}, s.compress = Compress::prompt, s.measured = parse_measure("all", 60, 40);
    const ReplayResult r = replay(session, entry, *policy, s);
    std::filesystem::remove(session.header().file);
    EXPECT_GT(r.merges, 0) << name;
    EXPECT_EQ(r.unbalanced, 0) << name;
    EXPECT_EQ(r.lost_in_folds + r.lost_by_clip, 0) << name;
  }
}

std::vector<Corner> defaults() {
  std::vector<Corner> all = corners();
  std::erase_if(all, [](const Corner& corner) { return !corner.parameter.empty(); });
  return all;
}

INSTANTIATE_TEST_SUITE_P(Catalogue, Property, testing::ValuesIn(corners()), name_of_corner);
INSTANTIATE_TEST_SUITE_P(Catalogue, Defaults, testing::ValuesIn(defaults()), name_of_corner);

}  // namespace
}  // namespace kv
