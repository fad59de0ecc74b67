// WeightedKV on given averages, at hook level (merge-methods: the paper's own toy A1, and the convex merge of A4). The
// streaming and one-shot examples A2, A3, A5 and A6 go through the whole engine in tests/python/test_engine_golden.py.
#define KV_REGISTER(Type) static_assert(true)  // the struct alone: the catalogue already has it
#include "policies/weighted_kv.cpp"

#include <gtest/gtest.h>

#include <map>

#include "core/fold.hpp"
#include "policies/adapter.hpp"

namespace {

/// A head whose slots have given average attention, with hooks called as the engine calls them.
class Head {
 public:
  Head(int key_dim, int value_dim, int tokens, int budget) : cache(key_dim, value_dim, tokens, tokens) {
    info.budget = budget, info.key_dim = key_dim, info.value_dim = value_dim;
    policy.sinks = 0, policy.managed = 1;  // no windows, as in the paper's Algorithm 1
  }

  void append(int token, const std::vector<float>& value) {
    const std::vector<float> key(static_cast<std::size_t>(info.key_dim));
    cache.append(token, key.data(), value.data());
  }

  /// Evicts the slot that scores lowest into its right neighbour; returns (victim, target) as tokens.
  std::pair<int, int> compress(const std::map<int, float>& averages) {
    const int now = cache.tokens()[static_cast<std::size_t>(cache.order().back())];
    std::vector<WeightedKV::Slot> states;
    for (const int token : cache.tokens()) states.push_back({averages.at(token) * static_cast<float>(now - token + 1)});
    auto head = kv::view_of<WeightedKV::Slot, kv::Empty, kv::Empty>(info, {now, kv::Phase::decode, 0, 0}, cache);
    head.state_ = states.data();
    int victim = -1;
    float lowest = kv::protect;
    for (int s = 0; s < cache.size(); ++s) {
      const float score = policy.score(
          kv::SlotView<WeightedKV::Slot>{states[static_cast<std::size_t>(s)], info, head.token(s), now, 1, 0});
      if (score < lowest) lowest = score, victim = s;
    }
    const kv::Fold plan = policy.on_merge(head, victim);
    const std::pair moved{head.token(victim), head.token(plan.target)};
    kv::FoldSums sums(cache);
    sums.add(plan, victim);
    EXPECT_TRUE(sums.write(kv::Dtype::float32).empty()) << "keys stay as they are";
    cache.adopt(plan.target, victim);
    cache.remove(std::vector<int>{victim}, [](int, int) {});
    return moved;
  }

  void expect_value(int token, const std::vector<float>& expected, float tolerance) {
    for (std::size_t c = 0; c < expected.size(); ++c) {
      const float got = cache.value(cache.slot_of(token))[c];
      EXPECT_TRUE(std::abs(got - expected[c]) <= tolerance) << "token " << token << " channel " << c << ": " << got;
    }
  }

  WeightedKV policy;
  kv::HeadInfo info;
  kv::Cache cache;
};

TEST(WeightedKvGolden, A1ThePapersToy) {
  Head head(1, 9, 9, 4);
  const auto append = [&](int token) {  // one-hot values: entries are mixing coefficients
    std::vector<float> value(9);
    value[static_cast<std::size_t>(token)] = 1;
    head.append(token, value);
  };
  for (int token = 1; token <= 5; ++token) append(token);
  using Moved = std::pair<int, int>;
  EXPECT_EQ(head.compress({{1, .3f}, {2, .1f}, {3, .5f}, {4, .3f}, {5, .5f}}), (Moved{2, 3}));
  append(6);
  EXPECT_EQ(head.compress({{1, .3f}, {3, .4f}, {4, .2f}, {5, .3f}, {6, .9f}}), (Moved{4, 5}));
  append(7);
  EXPECT_EQ(head.compress({{1, .3f}, {3, .4f}, {5, .2f}, {6, .5f}, {7, .7f}}), (Moved{5, 6}));
  append(8);
  EXPECT_EQ(head.compress({{1, .2f}, {3, .4f}, {6, .3f}, {7, .4f}, {8, .6f}}), (Moved{1, 3}));
  ASSERT_EQ(head.cache.size(), 4);
  head.expect_value(3, {0, 1 / 3.f, 1 / 9.f, 5 / 9.f, 0, 0, 0, 0, 0}, 1e-6f);
  head.expect_value(6, {0, 0, 0, 0, .114285714f, .171428571f, .714285714f, 0, 0}, 1e-6f);
  head.expect_value(7, {0, 0, 0, 0, 0, 0, 0, 1, 0}, 0);
  head.expect_value(8, {0, 0, 0, 0, 0, 0, 0, 0, 1}, 0);
  EXPECT_EQ(head.cache.standing_for(2), 3);
  EXPECT_EQ(head.cache.standing_for(4), 6);
  EXPECT_EQ(head.cache.multiplicities()[static_cast<std::size_t>(head.cache.slot_of(3))], 3);
}

TEST(WeightedKvGolden, A4TheConvexMerge) {
  Head head(2, 2, 2, 1);
  head.append(0, {1, 2}), head.append(1, {3, -1});  // token 1 is the newest and so protected: 0 goes into it
  EXPECT_EQ(head.compress({{0, .310702755f}, {1, .181532650f}}), (std::pair<int, int>{0, 1}));
  head.expect_value(1, {1.737584694f, .893622959f}, 1e-6f);
}

TEST(WeightedKvGolden, EqualWeightsWhenNothingWasAttended) {
  Head head(1, 1, 3, 2);
  head.append(0, {1}), head.append(1, {3}), head.append(2, {9});
  EXPECT_EQ(head.compress({{0, 0.f}, {1, 0.f}, {2, 1.f}}), (std::pair<int, int>{0, 1}));
  head.expect_value(1, {2}, 0);
}

}  // namespace
