#include "core/allocation.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.hpp"

namespace kv {
namespace {

/// Whole numbers near `line` that add up to `sum`: floors, and one more where the largest remainders are.
std::vector<int> rounded_to_sum(const std::vector<double>& line, int sum) {
  std::vector<int> whole;
  for (const double x : line) whole.push_back(static_cast<int>(x + 1e-9));
  std::vector<std::size_t> by_remainder(line.size());
  std::iota(by_remainder.begin(), by_remainder.end(), 0);
  std::stable_sort(by_remainder.begin(), by_remainder.end(),
                   [&](std::size_t a, std::size_t b) { return line[a] - whole[a] > line[b] - whole[b] + 1e-9; });
  const int left = sum - std::accumulate(whole.begin(), whole.end(), 0);
  for (int i = 0; i < left; ++i) ++whole[by_remainder[static_cast<std::size_t>(i)]];
  return whole;
}

/// Layers without a slot take one from the largest.
void give_everyone_a_slot(std::vector<int>& budgets) {
  for (int& budget : budgets)
    if (budget == 0) --*std::max_element(budgets.begin(), budgets.end()), budget = 1;
}

}  // namespace

std::vector<int> layer_budgets(const Allocation& allocation, int budget, int window, int tokens, int layers) {
  std::vector<int> budgets(static_cast<std::size_t>(layers), budget);
  const double base = budget - window;
  if (allocation.kind != Allocation::Kind::pyramid || layers < 2 || base <= 0 || tokens < 2 * base || tokens <= budget)
    return budgets;
  double low = base / allocation.beta, high = 2 * base - low;
  if (high > tokens - window) high = tokens - window, low = 2 * base - high;
  std::vector<double> line;
  for (int l = 0; l < layers; ++l) line.push_back(high - l * (high - low) / (layers - 1));
  budgets = rounded_to_sum(line, layers * (budget - window));
  for (int& b : budgets) b += window;
  give_everyone_a_slot(budgets);
  return budgets;
}

std::vector<int> head_budgets(const Allocation& allocation, int budget, std::span<const Candidates> heads) {
  struct Slot {
    float score;
    std::size_t head;
  };
  std::vector<int> budgets;
  std::vector<Slot> rest;  // beyond every head's reserve, by head and then by score
  int left = 0;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    std::vector<float> scores;
    for (std::size_t i = 0; i < heads[h].size(); ++i)
      if (heads[h].safety[i] == Safety::normal) scores.push_back(heads[h].score[i]);
    std::stable_sort(scores.begin(), scores.end(), std::greater<>());
    const int safe = std::min(budget, static_cast<int>(heads[h].size() - scores.size())), base = budget - safe;
    const int least = safe == 0 ? 1 : 0;
    const int reserved = std::clamp(share_of(allocation.floor, base), least, static_cast<int>(scores.size()));
    budgets.push_back(safe + reserved);
    left += base - reserved;
    for (std::size_t i = static_cast<std::size_t>(reserved); i < scores.size(); ++i) rest.push_back({scores[i], h});
  }
  std::stable_sort(rest.begin(), rest.end(), [](const Slot& a, const Slot& b) { return a.score > b.score; });
  KV_CHECK(left >= 0 && static_cast<std::size_t>(left) <= rest.size());
  for (int i = 0; i < left; ++i) ++budgets[rest[static_cast<std::size_t>(i)].head];
  return budgets;
}

}  // namespace kv
