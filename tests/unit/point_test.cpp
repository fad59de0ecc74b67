#include "experiments/point.hpp"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <set>

#include "config_error.hpp"
#include "kernels/engine.hpp"

namespace kv {
namespace {

std::vector<Point> points_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return resolve(expand(parse_config(text, "c.yaml", overrides)));
}

/// On the CPU unless `text` says otherwise, so that a machine's GPU changes nothing here.
Point point_of(const std::string& text) {
  const std::string backend = text.find("backend:") == std::string::npos ? "backend: cpu\n" : "";
  return points_of("trace: t.h5\n" + text + backend).at(0);
}

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return config_error([&] { points_of("trace: t.h5\n" + text, overrides); });
}

std::string value(const Point& point, const std::string& key) {
  for (const auto& [name, x] : point.values())
    if (name == key) return to_text(x);
  return "none";
}

std::string id(const std::string& text) { return run_id(canonical(point_of(text), "abc")); }

TEST(Point, ResolvesAutoToThePublishedSettings) {
  const Point snapkv = point_of("policy: snapkv\nbudget: 25%\n");
  EXPECT_EQ(value(snapkv, "replay.compress"), "prompt");
  EXPECT_EQ(value(snapkv, "replay.block"), "all");
  EXPECT_EQ(value(snapkv, "policy.window"), "32") << "unset parameters are there too";
  EXPECT_EQ(value(point_of("policy: full\nbackend: auto\n"), "backend"), devices().empty() ? "cpu" : "cuda");
  EXPECT_EQ(value(point_of("policy: snapkv\nbudget: 25%\nreplay.compress: always\n"), "replay.compress"), "always");
  const Point weighted = point_of("policy: weighted_kv\nbudget: 25%\n");
  EXPECT_EQ(weighted.block, Block{1});
  EXPECT_TRUE(std::holds_alternative<std::int64_t>(weighted.values()[5].second) ||
              value(weighted, "replay.block") == "1");
  EXPECT_EQ(value(point_of("policy: streaming_llm\nbudget: 25%\n"), "replay.positions"), "cache");
}

TEST(Point, SetsParametersOfThePolicy) {
  const Point point = point_of("policy: {name: snapkv, window: 16, pool: max}\nbudget: 25%\n");
  EXPECT_EQ(value(point, "policy.window"), "16");
  EXPECT_EQ(value(point, "policy.pool"), "max");
  EXPECT_EQ(point.policy->traits().observation_window, 16);
}

TEST(Point, KeepsTheBudgetAsWritten) {
  EXPECT_EQ(value(point_of("policy: h2o\nbudget: 1\n"), "budget"), "1");
  EXPECT_EQ(value(point_of("policy: h2o\nbudget: 1.0\n"), "budget"), "1.0");
  EXPECT_EQ(point_of("policy: h2o\nbudget: 1\n").budget.kind, Budget::Kind::slots);
  EXPECT_EQ(point_of("policy: h2o\nbudget: 1.0\n").budget.kind, Budget::Kind::share);
}

TEST(Point, FullIsTheSameAtEveryBudgetAndKeepsWhatWasWritten) {
  EXPECT_EQ(value(point_of("policy: full\n"), "budget"), "100%");
  EXPECT_EQ(value(point_of("policy: full\nbudget: 25%\n"), "budget"), "25%");
  EXPECT_EQ(point_of("policy: full\nbudget: 25%\n").budget.text, "100%");
  EXPECT_TRUE(error_of("policy: full\nbudget: 2x\n").starts_with("c.yaml:3: budget: expected a share"));
  EXPECT_EQ(id("policy: full\nbudget: 25%\n"), id("policy: full\nbudget: 50%\n"));
}

TEST(Point, AnInheritedParameterGoesToThePoliciesThatHaveIt) {
  const auto points = points_of("trace: t\nbudget: 1\npolicy.sinks: 2\nsweep: [{policy: [h2o, streaming_llm]}]\n");
  EXPECT_EQ(value(points[0], "policy.sinks"), "none");
  EXPECT_EQ(value(points[1], "policy.sinks"), "2");
  const auto given = points_of("trace: t\nbudget: 1\nsweep: [{policy: [h2o, snapkv]}]\n", {"policy.window=8"});
  EXPECT_EQ(value(given[1], "policy.window"), "8");
  const auto replaced = points_of("trace: t\nbudget: 1\npolicy: {name: snapkv, window: 8}\n", {"policy=tova"});
  EXPECT_EQ(value(replaced[0], "policy.window"), "none");
}

TEST(Point, AParameterThatNoPolicyHasIsAnError) {
  EXPECT_EQ(error_of("policy: {name: h2o, recnt: 0.5}\nbudget: 1\n"),
            "c.yaml:2: policy.recnt: policy h2o has no such parameter; did you mean 'recent'?");
  EXPECT_EQ(error_of("policy: [h2o, {name: snapkv, windw: 1}]\nbudget: 1\n"),
            "c.yaml:2: policy.windw: policy snapkv has no such parameter; did you mean 'window'?");
  EXPECT_EQ(error_of("budget: 1\npolicy.windo: 3\nsweep: [{policy: [h2o, snapkv]}]\n"),
            "c.yaml:3: policy.windo: no policy of this sweep has this parameter; did you mean 'window'?");
  EXPECT_EQ(error_of("policy: h2o\nbudget: 1\n", {"policy.window=3"}),
            "command line: policy.window: no policy of this sweep has this parameter");
  EXPECT_EQ(error_of("policy: {name: h2o, recnt: 0.5}\nbudget: 1\n", {"policy=tova"}),
            "c.yaml:2: policy.recnt: no policy of this sweep has this parameter")
      << "a typo stays one when the policy is replaced";
}

TEST(Point, ErrorsNameFileLineKeyAndNearestName) {
  EXPECT_EQ(error_of("policy: h2p\nbudget: 1\n"), "c.yaml:2: policy: no policy is called 'h2p'; did you mean 'h2o'?");
  EXPECT_EQ(error_of("policy: h2o\n"), "c.yaml:2: budget: missing; policy h2o needs one, such as 'budget: 25%'");
  EXPECT_TRUE(error_of("policy: h2o\nbudget: [10%, 2x]\n").starts_with("c.yaml:3: budget: expected a share"));
  EXPECT_EQ(error_of("policy: h2o\nbudget: 1\nreplay.compress: promt\n"),
            "c.yaml:4: replay.compress: expected one of auto, prompt, always, got 'promt'; did you mean 'prompt'?");
  EXPECT_EQ(error_of("policy: h2o\nbudget: 1\nreplay.block: 0\n"),
            "c.yaml:4: replay.block: expected 'all' or a number of tokens of at least 1, got '0'");
  EXPECT_EQ(error_of("policy: {name: snapkv, window: 0}\nbudget: 1\n"),
            "c.yaml:2: policy.window: expected int in [1, 4096], got '0'");
  EXPECT_EQ(error_of("policy: h2o\nbudget: 1\nseed: -1\n"),
            "c.yaml:4: seed: expected int in [0, 1073741824], got '-1'");
  EXPECT_EQ(error_of("policy: h2o\nbudget: 1\nbackend: gpu\n", {}).substr(0, 20), "c.yaml:4: backend: e");
  EXPECT_EQ(error_of("budget: 1\n"), "c.yaml: policy: missing");
  EXPECT_EQ(config_error([] { points_of("budget: 1\nsweep:\n - policy: h2o\n"); }), "c.yaml:3: trace: missing");
}

TEST(Point, CudaWithoutADeviceIsOneClearError) {
  if (!devices().empty()) GTEST_SKIP() << "there is a device: " << devices().front().name;
  try {
    points_of("trace: t\npolicy: h2o\nbudget: 1\nbackend: cuda\n");
    FAIL();
  } catch (const CudaError& error) {
    EXPECT_EQ(error.what(),
              fmt::format("c.yaml:4: backend: no CUDA device: {}; use backend: cpu or auto", why_no_device()));
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
  }
  EXPECT_THROW(points_of("trace: t\npolicy: full\n", {"backend=[cpu, cuda]"}), CudaError);
}

TEST(Point, OnTheGpuItIsAnotherRun) {
  if (devices().empty()) GTEST_SKIP() << "no CUDA device: " << why_no_device();
  EXPECT_NE(id("policy: h2o\nbudget: 25%\nbackend: cuda\n"), id("policy: h2o\nbudget: 25%\nbackend: cpu\n"));
  EXPECT_EQ(id("policy: h2o\nbudget: 25%\nbackend: cuda\n"), id("policy: h2o\nbudget: 25%\nbackend: auto\n"));
}

TEST(Resolve, PrecisionIsACudaPointsAlone) {
  EXPECT_EQ(value(point_of("policy: full\nreplay.precision: exact\n"), "replay.precision"), "exact");
  EXPECT_EQ(error_of("policy: full\nbackend: cpu\nreplay.precision: fast\n", {}),
            "c.yaml:4: replay.precision: fast is for cuda, and this point runs on cpu; use exact");
  Point point = point_of("policy: h2o\nbudget: 25%\n");
  const std::string exact = canonical(point, "abc");
  point.keys.precision = Precision::fast;
  EXPECT_NE(canonical(point, "abc"), exact) << "it changes results";
}

TEST(RunId, IsStable) {
  const std::string text = canonical(point_of("policy: h2o\nbudget: 25%\n"), "abc");
  EXPECT_EQ(
      text,
      R"({"backend":"cpu","budget":"25%","policy":"h2o","policy.recent":0.5,"policy.score":"sum","protect.recent":0,)"
      R"("protect.sinks":0,"replay.block":"all","replay.compress":"always","replay.measure":"decode",)"
      R"("replay.positions":"absolute","seed":0,"trace":"abc"})");
  EXPECT_EQ(run_id(text).size(), 16u);
  EXPECT_EQ(run_id("abc"), "ba7816bf8f01cfea") << "the first half of SHA-256's test vector";
}

TEST(RunId, TellsPointsApart) {
  std::set<std::string> ids;
  const std::vector<std::string> texts{
      "policy: h2o\nbudget: 25%\n",
      "policy: h2o\nbudget: 1\n",
      "policy: h2o\nbudget: 1.0\n",
      "policy: h2o\nbudget: 0.125\n",
      "policy: h2o\nbudget: 0.13\n",
      "policy: tova\nbudget: 25%\n",
      "policy: {name: h2o, recent: 0.125}\nbudget: 25%\n",
      "policy: {name: h2o, recent: 0.13}\nbudget: 25%\n",
      "policy: h2o\nbudget: 25%\nseed: 1\n",
      "policy: h2o\nbudget: 25%\nreplay.block: 1\n",
      "policy: h2o\nbudget: 25%\nprotect.sinks: 1\n",
      "policy: h2o\nbudget: 25%\nprotect.recent: 1\n",
      "policy: h2o\nbudget: 25%\nreplay.measure: all\n",
  };
  for (const std::string& text : texts) ids.insert(id(text));
  EXPECT_EQ(ids.size(), texts.size());
  const Point point = point_of(texts[0]);
  EXPECT_NE(canonical(point, "abc"), canonical(point, "abd")) << "the content of the trace counts";
}

TEST(RunId, IgnoresSpellingAndWhatIsNotComputed) {
  const std::string plain = id("policy: h2o\nbudget: 25%\n");
  EXPECT_EQ(id("policy: {name: h2o, recent: 0.50, score: sum}\nbudget: '25%'\nreplay: {block: all, compress: auto}\n"),
            plain);
  EXPECT_EQ(id("policy: h2o\nbudget: 25%\nseries: true\ntiming.repeats: 7\non_invalid: skip\nbackend: cpu\n"), plain);
}

TEST(Point, ThresholdsAndBudgetsExcludeEachOther) {
  const Point exact = point_of("policy: kv_merger\nbudget: 50%\n");
  EXPECT_EQ(value(exact, "policy.threshold"), "exact");
  const Point threshold = point_of("policy: {name: kv_merger, threshold: 0.75}\n");
  EXPECT_EQ(value(threshold, "policy.threshold"), "0.75");
  EXPECT_EQ(value(threshold, "budget"), "none");
  EXPECT_EQ(value(point_of("policy: {name: kv_merger, threshold: 0.75}\nbudget: none\n"), "budget"), "none");
  EXPECT_EQ(error_of("policy: h2o\nbudget: none\n"),
            "c.yaml:2: budget: missing; policy h2o needs one, such as 'budget: 25%'");
  EXPECT_EQ(error_of("policy: {name: kv_merger, threshold: 0.75}\nbudget: 50%\n"),
            "c.yaml:3: budget: policy kv_merger decides by a threshold how much stays; say 'budget: none', or let it "
            "be exact");
  EXPECT_EQ(error_of("policy: {name: kv_merger, threshold: exat}\nbudget: 50%\n"),
            "c.yaml:2: policy.threshold: expected number in [-1, 2] or exact, got 'exat'; did you mean 'exact'?");
}

TEST(Point, PresetsKeepTheirName) {
  const Point released = point_of("policy: kv_slimmer_released\nbudget: 50%\n");
  EXPECT_EQ(value(released, "policy"), "kv_slimmer_released");
  for (const auto& [key, expected] : std::vector<std::pair<std::string, std::string>>{{"policy.rule", "released"},
                                                                                      {"policy.picks", "faithful"},
                                                                                      {"policy.clip", "5"},
                                                                                      {"policy.smoothing", "true"},
                                                                                      {"policy.guard", "none"},
                                                                                      {"replay.block", "512"},
                                                                                      {"replay.compress", "prompt"},
                                                                                      {"replay.positions", "span"}})
    EXPECT_EQ(value(released, key), expected) << key;
}

}  // namespace
}  // namespace kv
