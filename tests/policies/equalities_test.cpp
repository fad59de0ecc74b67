// What one method must share with another (merge-methods, end): a policy whose merge is shut is its host; same victims
// with and without merging; nothing moves where nothing may.
#define KV_REGISTER(Type) static_assert(true)  // structs alone: the catalogue already has them
#include "policies/d2o.cpp"
#undef KV_REGISTER

#include <gtest/gtest.h>
#include <unistd.h>

#include <numeric>

#include "core/metrics.hpp"
#include "policies/adapter.hpp"
#include "tests/synthetic.hpp"

namespace {

/// D2O whose threshold nothing reaches.
struct ShutD2O : D2O {
  KV_HD void on_selected(auto team, auto& head) const {
    team.for_each(1, [&](int) { head.shared().threshold = INFINITY; });
  }
};

kv::Session& session() {
  static kv::Session s(kv::test::write_trace("equalities", {.window = 25, .wo = true, .e = true}, 5));
  return s;
}

kv::ReplaySettings settings(int budget, int block, kv::Compress compress) {
  kv::ReplaySettings s;
  s.budget = budget, s.block = {block}, s.compress = compress;
  s.measured = kv::parse_measure("all", 60, 40);
  return s;
}

using Parameters = std::vector<std::pair<std::string, kv::Value>>;

kv::ReplayResult run(const std::string& name, const Parameters& parameters, const kv::ReplaySettings& s) {
  const kv::PolicyEntry& entry = kv::find_policy(name);
  const auto policy = entry.make();
  for (const kv::Field& field : policy->fields())
    for (const auto& [key, value] : parameters)
      if (field.name == key) field.set(value);
  return kv::replay(session(), entry, *policy, s);
}

void expect_same_bits(const kv::ReplayResult& a, const kv::ReplayResult& b) {
  EXPECT_EQ(a.error2, b.error2);
  EXPECT_EQ(a.lost_mass, b.lost_mass);
  EXPECT_EQ(a.final_position, b.final_position);
  EXPECT_GT(a.evictions, 0);
}

TEST(Equalities, D2OWithAnInfiniteThresholdIsH2O) {
  kv::BoundPolicyOf<ShutD2O> shut;
  for (const kv::Field& field : shut.fields())
    if (field.name == "sinks") field.set(std::int64_t{0});
  const auto s = settings(12, 9, kv::Compress::always);
  const kv::ReplayResult a = kv::replay(session(), kv::entry_of<ShutD2O>("-"), shut, s);
  EXPECT_EQ(a.merges, 0);
  expect_same_bits(a, run("h2o", {{"recent", 0.25}}, s));
  expect_same_bits(run("d2o", {{"sinks", std::int64_t{0}}, {"merge", false}}, s), run("h2o", {{"recent", 0.25}}, s));
}

TEST(Equalities, CaMWithAShutGateIsItsHost) {
  for (const std::string host : {"streaming_llm", "h2o"}) {
    const auto always = settings(12, 9, kv::Compress::always), prompt = settings(12, 9, kv::Compress::prompt);
    expect_same_bits(run("cam", {{"host", host}, {"merge", false}}, always), run(host, {}, always));
    expect_same_bits(run("cam", {{"host", host}}, prompt), run(host, {}, prompt));  // only decode evictions merge
    EXPECT_GT(run("cam", {{"host", host}}, always).merges, 0);
  }
}

TEST(Equalities, MergeOffIsTheHostForTheOthers) {
  const auto s = settings(12, 9, kv::Compress::always);
  expect_same_bits(run("keepkv", {{"merge", false}}, s), run("h2o", {}, s));
  expect_same_bits(run("look_m", {{"merge", false}}, s), run("h2o", {}, s));
}

/// Keys that repeat their left neighbour exactly: cosines of one, and not more.
TEST(Equalities, KVMergerWithAThresholdOfOneIsFullForEqualKeysToo) {
  kv::Session twins(kv::test::write_trace("twins", {.rope = false}, 6, [](int, kv::LayerTensors& t) {
    for (std::size_t i = 16; i < t.k.size(); ++i)
      if (i / 16 % 2 == 1) t.k[i] = t.k[i - 16];
  }));
  const kv::PolicyEntry& entry = kv::find_policy("kv_merger");
  const auto policy = entry.make();
  for (const kv::Field& field : policy->fields())
    if (field.name == "threshold") field.set(1.0);
  const kv::ReplayResult r = kv::replay(twins, entry, *policy, settings(60, 40, kv::Compress::prompt));
  std::filesystem::remove(twins.header().file);
  EXPECT_EQ(r.merges, 0);
}

TEST(Equalities, KVMergerWithAThresholdOfOneIsFull) {
  const kv::ReplayResult r = run("kv_merger", {{"threshold", 1.0}}, settings(60, 9, kv::Compress::always));
  EXPECT_EQ(r.merges + r.evictions, 0);
  EXPECT_LE(kv::metrics_of(r).nmse.value(), 2e-6);
  EXPECT_GT(run("kv_merger", {{"threshold", 0.0}}, settings(60, 9, kv::Compress::always)).merges, 0);
}

double total(const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); }

/// Of policies with the parameter `merge`: one round of one compression drops exactly what it would have folded.
TEST(Equalities, MergeOffDropsTheSameVictims) {
  int tried = 0;
  for (const kv::PolicyEntry& entry : kv::policies()) {
    const auto policy = entry.make();
    bool can = false;
    for (const kv::Field& field : policy->fields()) can |= field.name == "merge";
    if (!can || entry.doc.name == std::string("cam")) continue;  // cam merges in decode only
    SCOPED_TRACE(entry.doc.name);
    ++tried;
    const bool probes = policy->traits().probe != kv::Probe::none;
    const auto s = settings(16, probes ? 20 : 40, kv::Compress::prompt);
    Parameters on{{"sinks", std::int64_t{2}}}, off{{"sinks", std::int64_t{2}}, {"merge", false}};
    if (entry.doc.name == std::string("keepkv"))
      on.emplace_back("threshold", -1.0), off.emplace_back("threshold", -1.0);
    const kv::ReplayResult folded = run(entry.doc.name, on, s), dropped = run(entry.doc.name, off, s);
    EXPECT_GT(folded.merges, 0);
    EXPECT_EQ(dropped.merges, 0);
    EXPECT_EQ(folded.merges + folded.evictions, dropped.evictions);
    EXPECT_EQ(folded.final_position, dropped.final_position);
    EXPECT_GT(total(dropped.lost_mass), total(folded.lost_mass));
  }
  EXPECT_EQ(tried, 10);
}

TEST(MassTv, OfPureEvictionIsTheLostMass) {
  for (const char* name : {"h2o", "random", "tova"}) {
    kv::ReplaySettings s = settings(12, 9, kv::Compress::always);
    s.mass = true;
    const kv::ReplayResult r = run(name, {}, s);
    ASSERT_EQ(r.mass_tv.size(), r.lost_mass.size());
    for (std::size_t i = 0; i < r.mass_tv.size(); ++i) ASSERT_NEAR(r.mass_tv[i], r.lost_mass[i], 2e-5) << name;
  }
}

TEST(MassTv, OfTheFullCacheIsNothing) {
  kv::ReplaySettings s = settings(60, 9, kv::Compress::always);
  s.mass = true;
  for (const double tv : run("full", {}, s).mass_tv) ASSERT_LE(tv, 2e-6);
}

}  // namespace
