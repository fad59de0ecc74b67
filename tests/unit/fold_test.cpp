// Folding rows: divisors, channels, and what is counted.
#include "core/fold.hpp"

#include <gtest/gtest.h>

#include "core/error.hpp"

namespace kv {
namespace {

Cache three_slots() {
  Cache cache(2, 1, 3, 3);
  const float keys[3][2] = {{1, 0}, {3, 4}, {5, 8}}, values[3] = {1, 2, 4};
  for (int t = 0; t < 3; ++t) cache.append(t, keys[t], &values[t]);
  return cache;
}

TEST(FoldSums, MakesWeightsConvex) {
  Cache cache = three_slots();
  FoldSums sums(cache);
  sums.add({.target = 0, .key = 1, .value = 3}, 1);
  EXPECT_EQ(sums.write(Dtype::float32), std::vector<int>{0});
  EXPECT_EQ(cache.key(0)[0], 2);
  EXPECT_EQ(cache.key(0)[1], 2);
  EXPECT_EQ(cache.value(0)[0], 1.75f);
  EXPECT_EQ(sums.unbalanced() + sums.weights_outside(), 0);
}

TEST(FoldSums, AValueFoldLeavesTheKeyAsItIs) {
  Cache cache = three_slots();
  FoldSums sums(cache);
  const Fold plan = ValueFold{.target = 0, .value = 1, .own_value = 3, .note = 2};
  EXPECT_EQ(plan.note, 2);
  sums.add(plan, 2);
  EXPECT_EQ(sums.write(Dtype::float32), std::vector<int>{}) << "no key has changed";
  EXPECT_EQ(cache.key(0)[0], 1);
  EXPECT_EQ(cache.key(0)[1], 0);
  EXPECT_EQ(cache.value(0)[0], 1.75f);  // (3 * 1 + 1 * 4) / 4
  EXPECT_EQ(sums.unbalanced() + sums.weights_outside(), 0);
}

TEST(FoldSums, OnTargetMayChangeDivisorsAndOwnWeights) {
  Cache cache = three_slots();
  cache.set_multiplicity(1, 4);
  FoldSums sums(cache);
  sums.add({.target = 0, .key = 1, .value = 1, .extra = 2}, 1);
  sums.add({.target = 0, .key = 1, .value = 1, .extra = 3}, 2);
  sums.adjust([](int target, FoldTarget& sum) {
    EXPECT_EQ(target, 0);
    EXPECT_EQ(sum.victims, 2);
    EXPECT_EQ(sum.multiplicity, 6);
    EXPECT_EQ(sum.extra, 5);
    EXPECT_EQ(sum.value, 2);
    EXPECT_EQ(sum.value_divisor, 3);
    sum.own_key = 2, sum.value_divisor = 1;
  });
  sums.write(Dtype::float32);
  EXPECT_EQ(cache.key(0)[1], 4) << "(2 x 0 + 4 + 8) / 3";
  EXPECT_EQ(cache.value(0)[0], 7) << "a sum";
  EXPECT_EQ(sums.unbalanced(), 1);
}

TEST(FoldSums, VictimsWithoutWeightStillScaleByTheDivisor) {
  Cache cache = three_slots();
  FoldSums sums(cache);
  sums.add({.target = 2, .key = 0, .value = 0}, 1);
  sums.adjust([](int, FoldTarget& sum) { sum.value_divisor = 0.5f; });
  EXPECT_TRUE(sums.write(Dtype::float32).empty()) << "the key is what it was";
  EXPECT_EQ(cache.value(2)[0], 8);
}

TEST(FoldSums, WeighsEveryChannel) {
  Cache cache = three_slots();
  FoldSums sums(cache);
  sums.add({.target = 0, .value = 1}, 1, std::vector<float>{1, 3}, std::vector<float>{1, 1});
  sums.write(Dtype::float32);
  EXPECT_EQ(cache.key(0)[0], 2);
  EXPECT_EQ(cache.key(0)[1], 3);
}

TEST(FoldSums, CountsWeightsThatLeaveTheUnitInterval) {
  Cache cache = three_slots();
  FoldSums sums(cache);
  sums.add({.target = 0, .key = -1, .own_key = 3}, 1);
  sums.write(Dtype::float32);
  EXPECT_EQ(sums.weights_outside(), 1);
  EXPECT_EQ(cache.key(0)[0], 0) << "(3 x 1 - 3) / 2";
}

TEST(FoldSums, RefusesADivisorOfZero) {
  Cache cache = three_slots();
  FoldSums sums(cache);
  sums.add({.target = 0, .key = -1}, 1);
  EXPECT_THROW(sums.write(Dtype::float32), InternalError);
}

TEST(Cache, TruncatesTheNewestSlots) {
  Cache cache = three_slots();
  cache.truncate(1);
  EXPECT_EQ(cache.size(), 1);
  EXPECT_EQ(cache.slot_of(2), -1);
  EXPECT_EQ(cache.standing_for(0), 0);
  const float row[2] = {9, 9};
  cache.append(1, row, row);
  EXPECT_EQ(cache.standing_for(1), 1);
}

}  // namespace
}  // namespace kv
