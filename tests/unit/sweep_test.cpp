#include "experiments/sweep.hpp"

#include <gtest/gtest.h>

#include "config_error.hpp"
#include "experiments/keys.hpp"

namespace kv {
namespace {

using Lines = std::vector<std::string>;

/// Each point as "key=value key=value", keys sorted.
Lines points_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  Lines lines;
  for (const RawPoint& point : expand(parse_config(text, "c.yaml", overrides))) {
    std::string line;
    for (const auto& [key, setting] : point.settings) line += (line.empty() ? "" : " ") + key + "=" + setting.text;
    lines.push_back(line);
  }
  return lines;
}

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return config_error([&] { points_of(text, overrides); });
}

TEST(Sweep, AFileWithoutSweepIsOneBlock) {
  EXPECT_EQ(points_of("policy: h2o\nbudget: 25%\n"), (Lines{"budget=25% policy=h2o"}));
  EXPECT_EQ(points_of("policy: [h2o, tova]\n"), (Lines{"policy=h2o", "policy=tova"}));
}

TEST(Sweep, AxesMakeAProductFirstWrittenOutermost) {
  EXPECT_EQ(points_of("policy: [h2o, tova]\nbudget: [1, 2]\n"),
            (Lines{"budget=1 policy=h2o", "budget=2 policy=h2o", "budget=1 policy=tova", "budget=2 policy=tova"}));
}

TEST(Sweep, DottedAndNestedAreTheSameKey) {
  EXPECT_EQ(points_of("replay: {block: 1, compress: prompt}\n"),
            points_of("replay.block: 1\nreplay.compress: prompt\n"));
  EXPECT_EQ(points_of("policy: {name: h2o, recent: 0.5}\n"), points_of("policy: h2o\npolicy.recent: 0.5\n"));
  EXPECT_EQ(points_of("policy.name: h2o\n"), points_of("policy: h2o\n"));
}

TEST(Sweep, BlocksOverrideTheBaseAndMapsMergeDeeply) {
  EXPECT_EQ(points_of("budget: 1\nreplay: {block: 1, compress: prompt}\nsweep:\n"
                      "  - {policy: h2o, replay: {block: 2}}\n  - {policy: tova, budget: [3, 4]}\n"),
            (Lines{"budget=1 policy=h2o replay.block=2 replay.compress=prompt",
                   "budget=3 policy=tova replay.block=1 replay.compress=prompt",
                   "budget=4 policy=tova replay.block=1 replay.compress=prompt"}));
}

TEST(Sweep, BaseListsAreAxesOfEveryBlock) {
  EXPECT_EQ(points_of("trace: [a, b]\nsweep:\n  - policy: full\n  - {policy: h2o, trace: c}\n"),
            (Lines{"policy=full trace=a", "policy=full trace=b", "policy=h2o trace=c"}));
}

TEST(Sweep, AnAxisMayListMapsWithAxesInside) {
  EXPECT_EQ(points_of("policy: [tova, {name: snapkv, window: [16, 32]}]\nbudget: 1\n"),
            (Lines{"budget=1 policy=tova", "budget=1 policy=snapkv policy.window=16",
                   "budget=1 policy=snapkv policy.window=32"}));
  EXPECT_EQ(points_of("replay: [{block: 1, compress: prompt}, {block: all}]\n"),
            (Lines{"replay.block=1 replay.compress=prompt", "replay.block=all"}));
}

TEST(Sweep, ABlockIsStrongerThanAMapOfABaseAxis) {
  EXPECT_EQ(points_of("replay: [{block: 1}, {block: 2}]\nsweep: [{replay.block: 3}]\n"),
            (Lines{"replay.block=3", "replay.block=3"}));
}

TEST(Sweep, ZipAdvancesTogether) {
  EXPECT_EQ(points_of("seed: [0, 1]\nzip: {budget: [1, 2], policy.window: [16, 32]}\n"),
            (Lines{"budget=1 policy.window=16 seed=0", "budget=2 policy.window=32 seed=0",
                   "budget=1 policy.window=16 seed=1", "budget=2 policy.window=32 seed=1"}));
  EXPECT_EQ(points_of("zip: {replay: {block: [1, 2], compress: [prompt, always]}}\n"),
            (Lines{"replay.block=1 replay.compress=prompt", "replay.block=2 replay.compress=always"}));
  EXPECT_EQ(points_of("zip.budget: [1, 2]\nzip.seed: [3, 4]\n"), (Lines{"budget=1 seed=3", "budget=2 seed=4"}));
}

TEST(Sweep, ZipNeedsEqualLengths) {
  EXPECT_EQ(error_of("seed: 1\nzip:\n  budget: [1, 2]\n  policy.window: [1, 2, 3]\n"),
            "c.yaml:4: zip: lists of different length: budget has 2, policy.window has 3");
  EXPECT_EQ(error_of("zip: [1, 2]\n"),
            "c.yaml:1: zip: expected a map of lists such as {budget: [25%, 50%], policy.window: [16, 32]}");
}

TEST(Sweep, TheCommandLineReplacesBaseAxisAndZipAlike) {
  const std::string text =
      "budget: [1, 2]\nsweep:\n  - policy: [h2o, tova]\n  - {policy: knorm, zip: {budget: [3, 4]}}\n";
  EXPECT_EQ(points_of(text, {"budget=9"}),
            (Lines{"budget=9 policy=h2o", "budget=9 policy=tova", "budget=9 policy=knorm"}));
  EXPECT_EQ(points_of("policy: h2o\n", {"budget=[1, 2]"}), (Lines{"budget=1 policy=h2o", "budget=2 policy=h2o"}));
  EXPECT_EQ(points_of("policy: [{name: h2o, recent: 1}, {name: h2o, recent: 2}]\n", {"policy.recent=3"}),
            (Lines{"policy=h2o policy.recent=3", "policy=h2o policy.recent=3"}));
  EXPECT_EQ(points_of("policy: h2o\n", {"replay={block: 1}"}), (Lines{"policy=h2o replay.block=1"}));
}

TEST(Sweep, RemembersWhereAKeyWasWritten) {
  const auto points = expand(parse_config("budget: 1\nsweep:\n  - policy: h2o\n", "c.yaml", {"seed=1"}));
  EXPECT_EQ(to_text(points[0].settings.at("budget").place), "c.yaml:1");
  EXPECT_EQ(points[0].settings.at("budget").level, Level::base);
  EXPECT_EQ(to_text(points[0].settings.at("policy").place), "c.yaml:3");
  EXPECT_EQ(to_text(points[0].settings.at("seed").place), "command line");
  EXPECT_EQ(to_text(points[0].place), "c.yaml:3");
}

TEST(Sweep, AMisspeltKeyAtEveryLevelIsAnErrorWithTheNearestName) {
  EXPECT_EQ(error_of("budgte: 1\n"), "c.yaml:1: budgte: unknown key; did you mean 'budget'?");
  EXPECT_EQ(error_of("policy: h2o\nswep: []\n"), "c.yaml:2: swep: unknown key; did you mean 'sweep'?");
  EXPECT_EQ(error_of("replay:\n  blok: 1\n"), "c.yaml:2: replay.blok: unknown key; did you mean 'replay.block'?");
  EXPECT_EQ(error_of("replay.comprss: [prompt]\n"),
            "c.yaml:1: replay.comprss: unknown key; did you mean 'replay.compress'?");
  EXPECT_EQ(error_of("protect: [{sink: 1}]\n"), "c.yaml:1: protect.sink: unknown key; did you mean 'protect.sinks'?");
  EXPECT_EQ(error_of("sweep:\n  - policy: h2o\n  - polcy: h2o\n"),
            "c.yaml:3: polcy: unknown key; did you mean 'policy'?");
  EXPECT_EQ(error_of("zip: {sed: [1]}\n"), "c.yaml:1: sed: unknown key; did you mean 'seed'?");
  EXPECT_EQ(error_of("policy: h2o\n", {"budgt=1"}), "command line: budgt: unknown key; did you mean 'budget'?");
  EXPECT_EQ(error_of("swep: [{policy: h2o}]\n"), "c.yaml:1: swep: unknown key; did you mean 'sweep'?");
  EXPECT_EQ(error_of("polcy: {name: h2o}\n"), "c.yaml:1: polcy: unknown key; did you mean 'policy'?");
  EXPECT_EQ(error_of("policy.: 1\n"), "c.yaml:1: policy.: unknown key; did you mean 'policy'?");
}

TEST(Sweep, RefusesWrongShapes) {
  EXPECT_EQ(error_of("replay: prompt\n"),
            "c.yaml:1: replay: expected a map with block, compress, positions, precision, measure");
  EXPECT_EQ(error_of("budget: []\n"), "c.yaml:1: budget: the list is empty");
  EXPECT_EQ(error_of("budget: [[1, 2]]\n"), "c.yaml:1: budget: a list inside a list");
  EXPECT_EQ(error_of("budget: {x: 1}\n"), "c.yaml:1: budget.x: unknown key; did you mean 'budget'?");
  EXPECT_EQ(error_of("sweep: {policy: h2o}\n"), "c.yaml:1: sweep: expected a list of blocks such as '- policy: h2o'");
  EXPECT_EQ(error_of("sweep: []\n"), "c.yaml:1: sweep: expected a list of blocks such as '- policy: h2o'");
  EXPECT_EQ(error_of("sweep: [h2o]\n"), "c.yaml:1: sweep: a block is a map of keys such as 'policy: h2o'");
  EXPECT_EQ(error_of("sweep: [{sweep: []}]\n"), "c.yaml:1: sweep: only at the top of a config file");
}

TEST(Sweep, RefusesAKeyGivenTwiceInOneMap) {
  EXPECT_EQ(error_of("replay.block: 1\nreplay: {block: 2}\n"), "c.yaml:2: replay.block: given twice, also at c.yaml:1");
  EXPECT_EQ(error_of("budget: [1, 2]\nzip: {budget: [1, 2]}\n"), "c.yaml:2: budget: given twice, also at c.yaml:1");
  EXPECT_EQ(error_of("policy: [{name: h2o, recent: 1}]\npolicy.recent: 2\n"),
            "c.yaml:2: policy.recent: given twice, also at c.yaml:1");
}

TEST(Sweep, RefusesASweepWithoutEnd) {
  std::string text;
  const char* keys[] = {"seed", "budget", "trace", "policy.a", "policy.b", "policy.c", "policy.d"};
  for (const char* key : keys) text += std::string(key) + ": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n";
  EXPECT_EQ(error_of(text), "c.yaml: this sweep has more than 100000 points");
}

TEST(Keys, AreUniqueAndHelped) {
  Keys keys;
  std::vector<std::string> names = key_names();
  for (const Field& field : fields_of(keys)) EXPECT_FALSE(field.help.empty()) << field.name;
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
}

}  // namespace
}  // namespace kv
