#include "core/select.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

namespace kv {
namespace {

void keep_within_protected(const Candidates& c, int budget, std::vector<std::uint8_t>& kept) {
  int left = budget;
  for (std::size_t i = 0; i < c.size() && left > 1; ++i)
    if (c.safety[i] == Safety::sink) kept[i] = 1, --left;
  for (std::size_t i = c.size(); i-- > 0 && left > 0;)
    if (c.safety[i] != Safety::normal && !kept[i]) kept[i] = 1, --left;
}

void keep_protected_and_best(const Candidates& c, int budget, std::vector<std::uint8_t>& kept) {
  std::vector<std::size_t> others;
  int left = budget;
  for (std::size_t i = 0; i < c.size(); ++i) {
    kept[i] = c.safety[i] != Safety::normal;
    if (kept[i])
      --left;
    else
      others.push_back(i);
  }
  const auto best = others.begin() + std::min<std::ptrdiff_t>(left, static_cast<std::ptrdiff_t>(others.size()));
  if (best != others.end())
    std::nth_element(others.begin(), best, others.end(), [&](std::size_t a, std::size_t b) {
      return c.score[a] != c.score[b] ? c.score[a] > c.score[b] : a < b;
    });
  std::for_each(others.begin(), best, [&](std::size_t i) { kept[i] = 1; });
}

}  // namespace

Candidates classify(std::span<const float> score, std::span<const int> token, const Protect& protect, int now) {
  Candidates c{{score.begin(), score.end()}, std::vector<Safety>(score.size(), Safety::normal)};
  for (std::size_t i = 0; i < c.size(); ++i) {
    const bool is_sink = score[i] == std::numeric_limits<float>::infinity() || token[i] < protect.sinks;
    const bool is_protected = score[i] == std::numeric_limits<float>::max() || now - token[i] < protect.recent;
    c.safety[i] = is_sink ? Safety::sink : is_protected ? Safety::protected_ : Safety::normal;
    if (c.safety[i] != Safety::normal) c.score[i] = 0;  // no longer compared: sums over heads stay finite
  }
  return c;
}

void combine(Candidates& sum, const Candidates& other) {
  for (std::size_t i = 0; i < sum.size(); ++i) {
    sum.score[i] += other.score[i];
    sum.safety[i] = std::max(sum.safety[i], other.safety[i]);
  }
}

std::vector<std::uint8_t> select(const Candidates& candidates, int budget) {
  std::vector<std::uint8_t> kept(candidates.size(), 0);
  const auto safe =
      std::count_if(candidates.safety.begin(), candidates.safety.end(), [](Safety s) { return s != Safety::normal; });
  if (safe > budget)
    keep_within_protected(candidates, budget, kept);
  else
    keep_protected_and_best(candidates, budget, kept);
  return kept;
}

}  // namespace kv
