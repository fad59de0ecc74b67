#include "experiments/plan.hpp"

#include <gtest/gtest.h>

#include "config_error.hpp"
#include "trace_fixture.hpp"

namespace kv {
namespace {

/// Plans over two small traces, "a" and "b", that differ only in the model's scale.
class PlanTest : public testing::Test {
 protected:
  PlanTest() {
    test::SampleTrace sample = test::sample();
    sample.infos[1].q_index.clear();
    sample.tensors[1] = test::random_tensors(sample.header, sample.infos[1], true);
    test::write(dir_ / "a.h5", sample);
    sample.header.model.scale = 0.5;
    test::write(dir_ / "b.h5", sample);
  }

  Plan plan(const std::string& text, const std::vector<std::string>& only = {}) const {
    const std::string trace = text.starts_with("trace") ? "" : "trace: " + path("a") + "\n";
    return make_plan(parse_config(trace + text, "c.yaml", {}), only);
  }
  std::string path(const std::string& name) const { return (dir_ / (name + ".h5")).string(); }

  test::TempDir dir_;
};

std::string text_of(const Point& point, const std::string& key) { return value_text(point, key); }

TEST_F(PlanTest, TracesWithTheSameTensorsAndAnotherScaleAreTwoRuns) {
  const Plan both = plan("trace: [" + path("a") + ", " + path("b") + "]\npolicy: h2o\nbudget: 2\n");
  ASSERT_EQ(both.points.size(), 2u);
  EXPECT_EQ(both.header(both.points[0]).content_sha256, both.header(both.points[1]).content_sha256);
  EXPECT_NE(both.points[0].run, both.points[1].run);
}

TEST_F(PlanTest, EqualPointsBecomeOneThatAsksForTheMost) {
  const Plan merged = plan(
      "policy: h2o\nbudget: 2\nsweep: [{timing.repeats: 2}, {timing.repeats: 5}, {timing.repeats: 3, series: true}]\n");
  ASSERT_EQ(merged.points.size(), 1u);
  EXPECT_EQ(merged.duplicates, 2u);
  EXPECT_TRUE(merged.points[0].keys.series);
  EXPECT_EQ(merged.points[0].keys.timing_repeats, 5);
  EXPECT_EQ(merged.points[0].settings.timing_repeats, 5) << "what the replay does, too";
}

TEST_F(PlanTest, FullIsOneRunAndShowsTheFirstBudgetWritten) {
  const Plan full = plan("policy: full\nbudget: [25%, 3]\n");
  ASSERT_EQ(full.points.size(), 1u);
  EXPECT_EQ(text_of(full.points[0], "budget"), "25%");
  EXPECT_EQ(full.points[0].run, plan("policy: full\n").points[0].run);
  EXPECT_EQ(full.points[0].settings.budget, 6) << "all tokens";
  EXPECT_EQ(text_of(plan("policy: full\nbudget: [25%, 3]\n", {"budget=3"}).points[0], "budget"), "3");
}

TEST_F(PlanTest, OnlyComparesValues) {
  const std::string text = "policy: {name: h2o, recent: [0.5, 0.25]}\nbudget: [2, 50%]\n";
  for (const char* half : {"0.5", "0.50", "5e-1"})
    EXPECT_EQ(plan(text, {std::string("policy.recent=") + half}).points.size(), 2u) << half;
  EXPECT_EQ(plan(text, {"seed=0.0", "budget=2", "policy.recent=.5"}).points.size(), 1u);
  EXPECT_EQ(config_error([&] { plan(text, {"policy.recent=0.51"}); }),
            "command line: --only: no point has policy.recent=0.51; did you mean '0.5'?");
  EXPECT_EQ(config_error([&] { plan(text, {"policy.recent=0.5x"}); }),
            "command line: --only: no point has policy.recent=0.5x; did you mean '0.5'?");
}

TEST_F(PlanTest, AMissingTraceIsTheConfigsFaultAndAFolderIsNoTrace) {
  EXPECT_EQ(config_error([&] { plan("trace: " + path("c") + "\npolicy: full\n"); }),
            "c.yaml:1: trace: no such file: " + path("c") + "; did you mean 'a.h5'?");
  for (const std::string& there : {(dir_ / "").string(), std::string("/dev/null")}) try {
      plan("trace: " + there + "\npolicy: full\n");
      FAIL() << there;
    } catch (const TraceError& error) {
      EXPECT_NE(std::string(error.what()).find("file"), std::string::npos) << error.what();
    }
}

}  // namespace
}  // namespace kv
