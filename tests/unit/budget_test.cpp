#include "core/budget.hpp"

#include <gtest/gtest.h>

#include "config_error.hpp"

namespace kv {
namespace {

TraceHeader trace_of(int tokens, int prompt) {
  TraceHeader header;
  header.tokens = tokens;
  header.prompt_tokens = prompt;
  header.layers.resize(4);
  header.model.kv_heads = 3;
  header.model.query_heads = 9;
  return header;
}

int slots(const std::string& text, int tokens = 1024, int prompt = 768, SlotBytes bytes = {256, 4, 0}) {
  return slots_of(parse_budget(text), trace_of(tokens, prompt), bytes);
}

TEST(Budget, SharesAreOfThePrompt) {
  EXPECT_EQ(slots("25%"), 192);
  EXPECT_EQ(slots("0.25"), 192);
  EXPECT_EQ(slots("6.25%"), 48);
  EXPECT_EQ(slots("100%"), 768);
  EXPECT_EQ(slots("1.0"), 768);
  EXPECT_EQ(slots("50%", 1000, 0), 500) << "of all tokens without a prompt";
}

TEST(Budget, SharesRoundDownAsDecimalsMeanIt) {
  EXPECT_EQ(slots("70%", 10, 10), 7);  // 0.7 * 10 is 6.999... in binary
  EXPECT_EQ(slots("0.3", 10, 10), 3);
  EXPECT_EQ(slots("0.39", 10, 10), 3);
  EXPECT_EQ(slots("0.001%"), 1) << "never less than one slot";
}

TEST(Budget, WholeNumbersAreSlots) {
  EXPECT_EQ(slots("1"), 1);
  EXPECT_EQ(slots("512"), 512);
  EXPECT_EQ(slots("99999999999"), 2147483647);
}

TEST(Budget, BytesAreOfAllLayersAndHeadsWithMetadata) {
  EXPECT_EQ(slots("1MiB"), 1048576 / 12 / 260);
  EXPECT_EQ(slots("1.5KiB", 1024, 768, {64, 4, 0}), 1536 / 12 / 68);
  EXPECT_EQ(slots("1GiB", 1024, 768, {256, 4, 1000}), (1073741824 / 12 - 1000) / 260);
  EXPECT_EQ(config_error([] { slots("3KiB"); }),
            "budget: 3KiB is less than one slot in each of the 12 recorded heads; the least is 3120 bytes");
}

TEST(Budget, KeepsItsTextAndItsKind) {
  EXPECT_EQ(parse_budget("0.250").text, "0.250");
  EXPECT_EQ(parse_budget("1").kind, Budget::Kind::slots);
  EXPECT_EQ(parse_budget("1.0").kind, Budget::Kind::share);
  EXPECT_EQ(parse_budget("1e-2").kind, Budget::Kind::share);
  EXPECT_EQ(parse_budget("64MiB").kind, Budget::Kind::bytes);
}

TEST(Budget, RefusesEverythingElseWithTheThreeSpellings) {
  for (const char* text : {"",     "0",    "-1", "0%",   "-5%",  "101%",  "1.01",   "2.0",     "nan", "nan%", "inf",
                           "25 %", "25%%", "x",  "64MB", "0MiB", "-1MiB", "nanGiB", "1e30GiB", "+5",  "0x10", "1,5"})
    EXPECT_EQ(
        config_error([&] { parse_budget(text); }),
        "budget: expected a share of the prompt such as 20% (or 0.2, at most 100%), slots per KV head such as 512, or "
        "bytes such as 64MiB; got '" +
            std::string(text) + "'");
}

}  // namespace
}  // namespace kv
