// The golden counts of eviction-methods G6 (PyramidKV, exact form) and G7 (Ada-KV, forced), and what must hold beyond
// them.
#include "core/allocation.hpp"

#include <gtest/gtest.h>

#include <numeric>

namespace kv {
namespace {

constexpr Allocation pyramid{Allocation::Kind::pyramid, 20, 0.2};

int sum(const std::vector<int>& x) { return std::accumulate(x.begin(), x.end(), 0); }

std::vector<int> beyond_window(int layers, int budget, int window, int tokens) {
  std::vector<int> budgets = layer_budgets(pyramid, budget, window, tokens, layers);
  for (int& b : budgets) b -= window;
  return budgets;
}

TEST(PyramidGolden, G6) {
  using Counts = std::vector<int>;
  EXPECT_EQ(beyond_window(8, 40, 8, 128), (Counts{62, 54, 45, 36, 28, 19, 10, 2}));
  EXPECT_EQ(beyond_window(8, 72, 8, 130), (Counts{122, 105, 89, 72, 56, 39, 23, 6})) << "clipped to the tokens";
  EXPECT_EQ(beyond_window(8, 72, 8, 60), Counts(8, 64)) << "shorter than the budget";
  EXPECT_EQ(beyond_window(8, 72, 8, 100), Counts(8, 64)) << "shorter than twice the budget: uniform";
  EXPECT_EQ(beyond_window(32, 128, 8, 7500),
            (Counts{234, 227, 219, 212, 205, 197, 190, 183, 175, 168, 160, 153, 146, 138, 131, 124,
                    116, 109, 102, 94,  87,  80,  72,  65,  57,  50,  43,  35,  28,  21,  13,  6}));
  EXPECT_EQ(beyond_window(32, 2048, 8, 7500),
            (Counts{3978, 3853, 3728, 3603, 3478, 3353, 3228, 3103, 2978, 2853, 2728, 2603, 2478, 2353, 2228, 2103,
                    1977, 1852, 1727, 1602, 1477, 1352, 1227, 1102, 977,  852,  727,  602,  477,  352,  227,  102}));
}

TEST(Pyramid, SumsAreExactAndNoLayerIsEmpty) {
  for (const int layers : {1, 2, 3, 30})
    for (const int budget : {1, 2, 7, 100})
      for (const int window : {0, 1, 8}) {
        const std::vector<int> budgets = layer_budgets(pyramid, budget, window, 5000, layers);
        EXPECT_EQ(sum(budgets), layers * budget) << layers << " layers, budget " << budget << ", window " << window;
        EXPECT_GE(*std::min_element(budgets.begin(), budgets.end()), 1);
        EXPECT_TRUE(std::is_sorted(budgets.rbegin(), budgets.rend()));
      }
}

std::vector<Candidates> g7() {
  const std::vector<Safety> normal(6, Safety::normal);
  return {{{.30f, .25f, .20f, .15f, .06f, .04f}, normal}, {{.90f, .05f, .02f, .01f, .01f, .01f}, normal}};
}

TEST(AdaptiveGolden, G7Forced) {
  const auto at = [](double floor) { return head_budgets({Allocation::Kind::adaptive, 20, floor}, 3, g7()); };
  for (const double floor : {0.0, 0.2, 0.34, 0.5}) EXPECT_EQ(at(floor), (std::vector{5, 1})) << floor;
  EXPECT_EQ(at(0.67), (std::vector{4, 2}));
  EXPECT_EQ(at(1.0), (std::vector{3, 3}));
}

TEST(Adaptive, ProtectedSlotsComeOnTopAndSumsAreExact) {
  std::vector<Candidates> heads = g7();
  heads[1].safety[5] = Safety::protected_, heads[1].score[5] = 0;
  const std::vector<int> budgets = head_budgets({Allocation::Kind::adaptive, 20, 0}, 3, heads);
  EXPECT_EQ(budgets, (std::vector{4, 2})) << "3 + 2 free slots: four best of head 0, one of head 1 beside its own";
  for (Safety& s : heads[0].safety) s = Safety::sink;
  EXPECT_EQ(sum(head_budgets({Allocation::Kind::adaptive, 20, 0}, 3, heads)), 6);
}

}  // namespace
}  // namespace kv
