#include "experiments/config.hpp"

#include <gtest/gtest.h>

#include <fstream>

#include "config_error.hpp"

namespace kv {
namespace {

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return config_error([&] { parse_config(text, "c.yaml", overrides); });
}

TEST(Config, KeepsOrderTextAndLines) {
  const Config config = parse_config("b: 1.0\na: [1, x]\n\nc:\n  d: '25%'\n", "c.yaml", {});
  ASSERT_EQ(config.root.members.size(), 3u);
  EXPECT_EQ(config.root.members[0].key, "b");
  EXPECT_EQ(config.root.members[0].value.text, "1.0") << "not 1: they are different budgets";
  EXPECT_EQ(config.root.members[1].value.items[1].text, "x");
  const Member& d = config.root.members[2].value.members.at(0);
  EXPECT_EQ(d.value.text, "25%");
  EXPECT_EQ(to_text(d.place), "c.yaml:5");
  EXPECT_EQ(config.file, "c.yaml");
}

TEST(Config, OverridesAreYaml) {
  const Config config =
      parse_config("a: 1", "c.yaml", {"budget=[10%, 20%]", "policy={name: h2o, recent: 0.3}", "x=a=b"});
  const auto& members = config.overrides.members;
  ASSERT_EQ(members.size(), 3u);
  EXPECT_EQ(members[0].value.items[1].text, "20%");
  EXPECT_EQ(members[1].value.members[1].key, "recent");
  EXPECT_EQ(members[2].value.text, "a=b");
  EXPECT_EQ(to_text(members[2].value.place), "command line");
}

TEST(Config, RefusesWhatIsNoMap) {
  EXPECT_EQ(error_of(""), "c.yaml: expected one YAML map, found nothing");
  EXPECT_EQ(error_of("# only a comment\n"), "c.yaml: expected one YAML map, found nothing");
  EXPECT_EQ(error_of("- a\n- b\n"), "c.yaml:1: expected a map of keys such as 'policy: h2o'");
  EXPECT_EQ(error_of("word"), "c.yaml:1: expected a map of keys such as 'policy: h2o'");
  EXPECT_EQ(error_of("a: 1\n---\nb: 2\n"), "c.yaml: expected one YAML map, found 2 documents ('---' starts another)");
  EXPECT_EQ(parse_config("---\na: 1\n", "c.yaml", {}).root.members.size(), 1u) << "the first may be started so, too";
}

TEST(Config, NamesTheLineOfASyntaxError) {
  EXPECT_TRUE(error_of("a: 1\nb: [1, 2\n").starts_with("c.yaml:")) << error_of("a: 1\nb: [1, 2\n");
  EXPECT_TRUE(error_of("a: 1\nb: *nowhere\n").starts_with("c.yaml:2: ")) << error_of("a: 1\nb: *nowhere\n");
  EXPECT_TRUE(error_of("a: 1", {"b=[1"}).starts_with("command line: b: ")) << error_of("a: 1", {"b=[1"});
}

TEST(Config, RefusesDuplicatesAndMissingValues) {
  EXPECT_EQ(error_of("a: 1\nb: 2\na: 3\n"), "c.yaml:3: a: given twice");
  EXPECT_EQ(error_of("a: 1\nb: {c: 1, c: 2}\n"), "c.yaml:2: c: given twice");
  EXPECT_EQ(error_of("a: 1\nb:\n"), "c.yaml:2: b: a value is missing");
  EXPECT_EQ(error_of("a: [1, ~]\n"), "c.yaml:1: a value is missing");
  EXPECT_EQ(error_of("? [1, 2]\n: 3\n"), "c.yaml:1: a key must be a word");
  EXPECT_EQ(error_of("a: 1", {"b=1", "b=2"}), "command line: b: given twice");
  EXPECT_EQ(error_of("a: 1", {"b="}), "command line: b: a value is missing");
  EXPECT_EQ(error_of("a: 1", {"b"}), "command line: expected key=value, got 'b'");
  EXPECT_EQ(error_of("a: 1", {"=1"}), "command line: expected key=value, got '=1'");
}

TEST(Config, AnchorsMayRepeatButNotRunAway) {
  EXPECT_EQ(parse_config("a: &x [1, 2]\nb: *x\n", "c.yaml", {}).root.members[1].value.items.size(), 2u);
  EXPECT_NE(error_of("a: &x [*x]\n"), "nothing was thrown");
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 9; ++i) {
    const std::string inner = "*a" + std::to_string(i - 1);
    std::string list = inner;
    for (int j = 1; j < 10; ++j) list += ", " + inner;
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + list + "]\n";
  }
  EXPECT_NE(error_of(bomb).find("too deeply or too large"), std::string::npos) << error_of(bomb);
}

TEST(Config, NamesAFileThatCannotBeRead) {
  EXPECT_EQ(config_error([] { read_config("/nowhere/c.yaml", {}); }),
            "/nowhere/c.yaml: cannot be read: No such file or directory");
  EXPECT_EQ(config_error([] { read_config("/tmp", {}); }), "/tmp: cannot be read: Is a directory");
}

}  // namespace
}  // namespace kv
