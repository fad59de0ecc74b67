// Which links join, and which slots stay.
#include "core/select.hpp"

#include <gtest/gtest.h>

#include <limits>

namespace kv {
namespace {

constexpr float never = std::numeric_limits<float>::infinity();

Candidates links(std::vector<float> score) {
  std::vector<int> token(score.size());
  for (std::size_t i = 0; i < token.size(); ++i) token[i] = static_cast<int>(i);
  return classify_links(score, token, {}, static_cast<int>(token.size()) - 1);
}

/// The slots that stay, as text: "110" drops the third.
std::string joined(const Candidates& c, int budget, Picks picks, float below = -never) {
  Traits traits;
  traits.select = Select::links, traits.picks = picks, traits.every_link_below = below;
  std::string text;
  for (const auto kept : select_links(c, budget, traits)) text += kept ? '1' : '0';
  return text;
}

TEST(SelectLinks, FaithfulAndFoldTakeTheLowest) {
  const Candidates c = links({5, 1, 2, 9, 0});  // links 0-1, 1-2, 2-3, 3-4; the last is none
  for (const Picks picks : {Picks::faithful, Picks::fold}) {
    EXPECT_EQ(joined(c, 4, picks), "11011");
    EXPECT_EQ(joined(c, 3, picks), "11001") << "neighbouring links";
    EXPECT_EQ(joined(c, 1, picks), "10000");
  }
}

TEST(SelectLinks, DisjointLinksShareNoSlotAndTheOlderOfEqualsComesFirst) {
  EXPECT_EQ(joined(links({5, 1, 2, 9, 0}), 3, Picks::disjoint), "11010") << "1-2, then 3-4: 2-3 touches 1-2";
  EXPECT_EQ(joined(links({1, 1, 1, 1, 1}), 4, Picks::disjoint), "10111");
  EXPECT_EQ(joined(links({1, 1, 1, 1, 1}), 1, Picks::disjoint), "10101") << "one round joins no more than fit";
}

TEST(SelectLinks, SinksNeverJoinButForThoseBeyondTheBudget) {
  const Candidates c = links({never, never, 3, 1, 0});
  EXPECT_EQ(joined(c, 3, Picks::fold), "11100");
  EXPECT_EQ(joined(c, 2, Picks::fold), "11000") << "only the first of two sinks fits a budget of 2: its link is left";
  EXPECT_EQ(joined(c, 1, Picks::fold), "10000");
}

TEST(SelectLinks, ProtectedLinksJoinWhenNothingElseIsLeft) {
  const float safe = std::numeric_limits<float>::max();
  const Candidates c = links({safe, 2, safe, safe, 0});
  EXPECT_EQ(joined(c, 4, Picks::fold), "11011");
  EXPECT_EQ(joined(c, 3, Picks::fold), "10011") << "the oldest of them first";
  EXPECT_EQ(joined(c, 3, Picks::disjoint), "11011") << "in the next round at the earliest";
}

TEST(SelectLinks, TheEnginesOwnProtectionBarsLinksOnBothSides) {
  const std::vector<float> score{1, 1, 1, 1, 1};
  const std::vector<int> token{0, 1, 2, 3, 4};
  const Candidates c = classify_links(score, token, {1, 2}, 4);
  EXPECT_EQ(joined(c, 4, Picks::fold), "11011") << "slot 0 is a sink, 3 and 4 are recent: 1-2 is free";
  EXPECT_EQ(joined(c, 3, Picks::fold), "11001") << "then 2-3, the oldest that touches a protected slot";
}

TEST(SelectLinks, AThresholdTakesEveryLinkBelowItWhateverTheBudget) {
  const Candidates c = links({-.9f, -.5f, -.8f, std::numeric_limits<float>::max(), 0});
  EXPECT_EQ(joined(c, 1, Picks::fold, -.7f), "10101");
  EXPECT_EQ(joined(c, 5, Picks::fold, -.7f), "10101");
  EXPECT_EQ(joined(c, 1, Picks::fold, -1.f), "11111");
}

}  // namespace
}  // namespace kv
