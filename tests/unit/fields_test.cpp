#include "core/fields.hpp"

#include <gtest/gtest.h>

#include "config_error.hpp"

namespace kv {
namespace {

struct Settings {
  enum class Pool { avg, max } pool = Pool::avg;
  bool on = true;
  int n = 3;
  double share = 0.5;
  std::string word = "x";
  void describe(auto& field) {
    field("on", on, "a switch");
    field("n", n, Range{1, 16}, "a count");
    field("share", share, Range{0, 1}, "a share");
    field("word", word, "some text");
    field("pool", pool, Choices{"avg", "max"}, "how");
  }
};

std::string error_of(const std::string& name, const std::string& text) {
  Settings s;
  for (const Field& field : fields_of(s))
    if (field.name == name) return config_error([&] { parse_value(field, text); });
  return "no such field";
}

TEST(Fields, ListsEveryMemberInOrderWithItsDefault) {
  Settings s;
  std::string all;
  for (const Field& field : fields_of(s)) all += field.name + "=" + to_text(field.get()) + ":" + field.type + " ";
  EXPECT_EQ(all, "on=true:bool n=3:int share=0.5:number word=x:text pool=avg:choice ");
}

TEST(Fields, SetWritesTheObject) {
  Settings s;
  const std::vector<Field> fields = fields_of(s);
  const char* texts[] = {"false", "16", "0.25", "y z", "max"};
  for (std::size_t i = 0; i < fields.size(); ++i) fields[i].set(parse_value(fields[i], texts[i]));
  EXPECT_FALSE(s.on);
  EXPECT_EQ(s.n, 16);
  EXPECT_EQ(s.share, 0.25);
  EXPECT_EQ(s.word, "y z");
  EXPECT_EQ(s.pool, Settings::Pool::max);
}

TEST(Fields, RefusesWhatIsNotTheTypeOrNotInRange) {
  EXPECT_EQ(error_of("n", "0"), "n: expected int in [1, 16], got '0'");
  EXPECT_EQ(error_of("n", "1.0"), "n: expected int in [1, 16], got '1.0'");
  EXPECT_EQ(error_of("n", "99999999999999999999"), "n: expected int in [1, 16], got '99999999999999999999'");
  EXPECT_EQ(error_of("share", "1.5"), "share: expected number in [0, 1], got '1.5'");
  EXPECT_EQ(error_of("share", "nan"), "share: expected number in [0, 1], got 'nan'");
  EXPECT_EQ(error_of("share", "0.5x"), "share: expected number in [0, 1], got '0.5x'");
  EXPECT_EQ(error_of("on", "yes"), "on: expected true or false, got 'yes'");
  EXPECT_EQ(error_of("pool", "mx"), "pool: expected one of avg, max, got 'mx'; did you mean 'max'?");
}

TEST(Fields, TextReadsBackToTheSameValue) {
  EXPECT_EQ(to_text(Value(0.1)), "0.1");
  EXPECT_EQ(to_text(Value(2.0)), "2.0");
  EXPECT_EQ(to_text(Value(1e-21)), "1e-21");
  EXPECT_EQ(to_text(Value(std::int64_t{-1})), "-1");
  EXPECT_EQ(to_text(Value(false)), "false");
}

TEST(Nearest, NamesTypoButNotAnotherWord) {
  const std::vector<std::string> names{"streaming_llm", "h2o", "tova"};
  EXPECT_EQ(nearest("streaming-llm", names), "streaming_llm");
  EXPECT_EQ(nearest("h20", names), "h2o");
  EXPECT_EQ(nearest("quantisation", names), "");
  EXPECT_EQ(did_you_mean("tovа", {}), "");
}

}  // namespace
}  // namespace kv
