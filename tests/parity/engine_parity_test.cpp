// The two engines give the same results: every policy over a cover of shapes and settings, over its parameters, and on
// real traces. Skipped without a device.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/parity/cases.hpp"
#include "tests/parity/made_trace.hpp"
#include "tests/parity/pairwise.hpp"

namespace kv::test {
namespace {

constexpr int kv_heads = 2;

/// One row of the cover: a trace and how it is replayed.
struct Row {
  Dtype dtype;
  int tokens, group, dim;
  const char* model;  // what its attention has beside the usual
  const char* rope;
  int block;
  Compress compress;
  Positions positions;
  const char* budget;
  const char* measure;

  Shape shape() const {
    Shape s{.kv_heads = kv_heads, .group = group, .head_dim = dim, .value_dim = dim, .tokens = tokens};
    s.prompt_tokens = tokens * 3 / 4, s.dtype = dtype, s.wo = s.e = true;
    s.rope = std::string(rope) != "none";
    s.style = std::string(rope) == "interleaved" ? RopeStyle::interleaved : RopeStyle::half;
    const std::string variant = model;
    if (variant == "softcap") s.softcap = 20;
    if (variant == "window") s.window = std::max(2, tokens / 3);
    s.sink_logit = variant == "sinks";
    return s;
  }
  ReplaySettings settings() const {
    ReplaySettings s;
    s.block = {block}, s.compress = compress, s.positions = positions, s.seed = 3;
    s.measured = parse_measure(measure, tokens, tokens * 3 / 4);
    return s;
  }
  std::string name() const {
    return fmt::format("{}, {} tokens, group {}, d {}, {}, rope {}, block {}, measure {}", kv::name_of(dtype), tokens,
                       group, dim, model, rope, kv::name_of(Block{block}), measure);
  }
};

std::vector<Row> cover() {
  const std::vector<Dtype> dtypes{Dtype::float16, Dtype::bfloat16, Dtype::float32};
  const std::vector<int> tokens{1, 31, 33, 127, 257, 1000}, groups{1, 3, 4, 8}, dims{64, 80, 96, 128},
      blocks{0, 128, 1};
  const std::vector<const char*> models{"plain", "softcap", "window", "sinks"}, ropes{"half", "interleaved", "none"},
      budgets{"6%", "25%", "60%"}, measures{"decode", "all"};
  const std::vector<Compress> compress{Compress::prompt, Compress::always};
  const std::vector<Positions> positions{Positions::absolute, Positions::cache, Positions::span};
  std::vector<Row> rows;
  for (const std::vector<int>& r : pairwise_cover({3, 6, 4, 4, 4, 3, 3, 2, 3, 3, 2})) {
    const auto at = [&](std::size_t axis) { return static_cast<std::size_t>(r[axis]); };
    rows.push_back({dtypes[at(0)], tokens[at(1)], groups[at(2)], dims[at(3)], models[at(4)], ropes[at(5)],
                    blocks[at(6)], compress[at(7)], positions[at(8)], budgets[at(9)], measures[at(10)]});
  }
  return rows;
}

/// The row for one policy. Where the policy cannot do it, the nearest that it can, so that it meets every shape.
Case case_of(const TraceHeader& trace, const PolicyEntry& entry, const Row& row) {
  ReplaySettings settings = row.settings();
  for (const bool prompt_only : {false, true})
    for (const bool absolute : {false, true}) {
      if (prompt_only) settings.compress = Compress::prompt;
      settings.positions = absolute ? Positions::absolute : row.positions;
      const Case c = make_case(trace, entry, {}, row.budget, settings, row.name());
      if (possible(trace, c)) return c;
    }
  return make_case(trace, entry, {}, row.budget, settings, row.name());
}

class EngineParity : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (devices().empty()) GTEST_SKIP() << "no CUDA device: " << why_no_device();
  }

  /// The policies that the filter lets run: all of them share a trace and a call.
  static std::vector<const PolicyEntry*> asked() {
    std::set<std::string> names;
    const testing::UnitTest& all = *testing::UnitTest::GetInstance();
    for (int s = 0; s < all.total_test_suite_count(); ++s)
      for (int t = 0; t < all.GetTestSuite(s)->total_test_count(); ++t) {
        const testing::TestInfo& test = *all.GetTestSuite(s)->GetTestInfo(t);
        if (test.should_run() && test.value_param()) names.insert(test.value_param());
      }
    std::vector<const PolicyEntry*> entries;
    for (const PolicyEntry& entry : policies())
      if (names.contains(fmt::format("\"{}\"", entry.doc.name))) entries.push_back(&entry);
    return entries;
  }
};

Agreements compare_cover(const std::vector<const PolicyEntry*>& entries) {
  Agreements out;
  std::uint64_t seed = 0;
  for (const Row& row : cover()) {
    ++seed;
    if (emulated() && row.tokens > 127) continue;
    MadeTrace trace(fmt::format("cover-{}", seed), row.shape(), seed);
    std::vector<Case> cases;
    for (const PolicyEntry* entry : entries) cases.push_back(case_of(trace.session().header(), *entry, row));
    compare_engines(trace.session(), cases, out);
  }
  return out;
}

TEST_P(EngineParity, AgreesOverACoverOfShapesAndSettings) {
  static const Agreements all = compare_cover(asked());
  const Agreement& a = all.at(GetParam());
  expect_agreement(a, kv_heads);
  EXPECT_GE(a.points, 9 * (a.points + a.impossible) / 10) << "most of the cover must be possible";
}

/// Every parameter of a policy, and what goes with any policy: allocations, protection, the metric of moved mass.
std::vector<Case> cases_of(const TraceHeader& trace, const PolicyEntry& entry) {
  std::vector<Case> cases;
  for (const Compress compress : {Compress::prompt, Compress::always}) {
    ReplaySettings settings;
    settings.compress = compress, settings.block = {60}, settings.positions = entry.published.positions;
    settings.measured = parse_measure("all", trace.tokens, trace.prompt_tokens);
    const auto add = [&](const Parameters& parameters, const char* budget, const std::string& name) {
      cases.push_back(make_case(trace, entry, parameters, budget, settings, name));
    };
    for (const Parameters& parameters : variants(entry)) add(parameters, "25%", "variant");
    for (const auto kind : {Allocation::Kind::pyramid, Allocation::Kind::adaptive}) {
      settings.allocation.kind = kind;
      for (const int block : {60, 16, 1}) {  // budgets that the first block exceeds, and that it does not
        settings.block = {block};
        for (const char* budget : {"2", "25%"}) add({}, budget, name_of(kind));
      }
      settings.block = {60};
    }
    settings.allocation = {}, settings.protect = {3, 5};
    for (const char* budget : {"1", "6", "25%"}) add({}, budget, "protected");
    settings.protect = {}, settings.mass = true;
    add({}, "25%", "mass");
    settings.mass = false, settings.seed = 9;
    add({}, "100%", "everything");
  }
  return cases;
}

Agreements compare_variants(const std::vector<const PolicyEntry*>& entries) {
  Agreements out;
  MadeTrace trace("variants",
                  {.kv_heads = kv_heads,
                   .group = 3,
                   .head_dim = 64,
                   .value_dim = 64,
                   .tokens = 257,
                   .prompt_tokens = 190,
                   .wo = true,
                   .e = true},
                  5);
  std::vector<Case> cases;
  for (const PolicyEntry* entry : entries)
    std::ranges::move(cases_of(trace.session().header(), *entry), std::back_inserter(cases));
  compare_engines(trace.session(), cases, out);
  return out;
}

TEST_P(EngineParity, AgreesForEveryParameterAndSetting) {
  static const Agreements all = compare_variants(asked());
  expect_agreement(all.at(GetParam()), kv_heads);
}

Agreements compare_real(const std::vector<const PolicyEntry*>& entries) {
  Agreements out;
  for (const char* file : {"/smollm2-135m-wikitext2.h5", "/smollm2-135m-retrieval.h5"}) {
    Session session(std::string(KV_TEST_DATA) + file);
    const TraceHeader& trace = session.header();
    std::vector<Case> cases;
    for (const PolicyEntry* entry : entries)
      for (const Compress compress : {Compress::prompt, Compress::always}) {
        ReplaySettings settings;
        settings.block = entry->published.block, settings.positions = entry->published.positions;
        settings.compress = compress, settings.measured = parse_measure("decode", trace.tokens, trace.prompt_tokens);
        cases.push_back(make_case(trace, *entry, {}, "12.5%", settings, file));
      }
    compare_engines(session, cases, out);
  }
  return out;
}

TEST_P(EngineParity, AgreesOnRealTraces) {
  static const Agreements all = compare_real(asked());
  expect_agreement(all.at(GetParam()), 3);  // KV heads
}

INSTANTIATE_TEST_SUITE_P(Catalogue, EngineParity, testing::ValuesIn(policy_names()),
                         [](const auto& policy) { return policy.param; });

TEST(PairwiseCover, HoldsEveryPairInFewRows) {
  const std::vector<int> choices{3, 6, 4, 4, 4, 3, 3, 2, 3, 3, 2};
  std::set<Pair> missing = all_pairs(choices);
  const auto rows = pairwise_cover(choices);
  for (const std::vector<int>& row : rows)
    for (std::size_t a = 0; a < row.size(); ++a)
      for (const Pair& pair : pairs_with(row, static_cast<int>(a), row[a])) missing.erase(pair);
  EXPECT_TRUE(missing.empty());
  EXPECT_LE(rows.size(), 36u) << "the two longest axes alone need 24";
}

}  // namespace
}  // namespace kv::test
