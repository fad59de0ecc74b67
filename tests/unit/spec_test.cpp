#include "core/spec.hpp"

#include <gtest/gtest.h>

#include "config_error.hpp"

namespace kv {
namespace {

TEST(Block, IsAllOrAPositiveNumber) {
  EXPECT_EQ(parse_block("all"), Block{});
  EXPECT_EQ(parse_block("128"), Block{128});
  EXPECT_EQ(name_of(parse_block("all")), "all");
  EXPECT_EQ(name_of(parse_block("128")), "128");
  for (const char* text : {"0", "-1", "1.0", "", "ALL", "1 ", "99999999999"})
    EXPECT_EQ(config_error([&] { parse_block(text); }),
              "replay.block: expected 'all' or a number of tokens of at least 1, got '" + std::string(text) + "'");
}

using Tokens = std::vector<int>;

TEST(Measure, NamesTokens) {
  EXPECT_EQ(parse_measure("decode", 6, 4), (Tokens{4, 5}));
  EXPECT_EQ(parse_measure("prompt", 6, 4), (Tokens{0, 1, 2, 3}));
  EXPECT_EQ(parse_measure("all", 3, 2), (Tokens{0, 1, 2}));
  EXPECT_EQ(parse_measure("last:2", 6, 0), (Tokens{4, 5}));
  EXPECT_EQ(parse_measure("last:9", 2, 0), (Tokens{0, 1}));
}

TEST(Measure, RefusesOtherWordsAndNothing) {
  for (const char* text : {"last", "last:", "last:0", "last:-1", "last:x", "Decode", ""})
    EXPECT_EQ(config_error([&] { parse_measure(text, 6, 4); }),
              "replay.measure: expected decode, prompt, all or last:N, got '" + std::string(text) + "'");
  EXPECT_EQ(config_error([] { parse_measure("decode", 6, 6); }),
            "replay.measure: 'decode' measures nothing of a trace with 6 tokens, 6 of them the prompt");
  EXPECT_NE(config_error([] { parse_measure("prompt", 6, 0); }), "nothing was thrown");
}

TEST(Share, RoundsDownAsDecimalsMeanIt) {
  EXPECT_EQ(share_of(0.7, 10), 7);
  EXPECT_EQ(share_of(0.5, 49), 24);
  EXPECT_EQ(share_of(0.0, 10), 0);
  EXPECT_EQ(share_of(1.0, 10), 10);
}

}  // namespace
}  // namespace kv
