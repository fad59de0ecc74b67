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

Candidates classify_links(std::span<const float> score, std::span<const int> token, const Protect& protect, int now) {
  Candidates c = classify(score, token, protect, now);
  for (std::size_t i = 0; i + 1 < c.size(); ++i)
    if (c.safety[i] == Safety::normal && now - token[i + 1] < protect.recent) c.safety[i] = Safety::protected_;
  return c;
}

void combine(Candidates& sum, const Candidates& other) {
  for (std::size_t i = 0; i < sum.size(); ++i) {
    sum.score[i] += other.score[i];
    sum.safety[i] = std::max(sum.safety[i], other.safety[i]);
  }
}

std::vector<std::uint8_t> select_links(const Candidates& candidates, int budget, const Traits& traits) {
  const std::size_t slots = candidates.size();
  const auto safety = [&](std::size_t i) {
    const bool fits = static_cast<int>(i) < budget - 1;
    return candidates.safety[i] == Safety::sink && !fits ? Safety::protected_ : candidates.safety[i];
  };
  const auto score = [&](std::size_t i) { return safety(i) == Safety::normal ? candidates.score[i] : 0.f; };
  std::vector<std::size_t> links;
  for (std::size_t i = 0; i + 1 < slots; ++i)
    if (safety(i) != Safety::sink) links.push_back(i);
  std::stable_sort(links.begin(), links.end(), [&](std::size_t a, std::size_t b) {
    return safety(a) != safety(b) ? safety(a) < safety(b) : score(a) < score(b);
  });
  const bool by_limit = !traits.needs_budget();
  auto left = by_limit ? static_cast<std::ptrdiff_t>(slots) : static_cast<std::ptrdiff_t>(slots) - budget;
  std::vector<std::uint8_t> kept(slots, 1), used(slots, 0);
  for (const std::size_t i : links) {
    const bool round_is_over = traits.picks == Picks::disjoint && safety(i) != safety(links.front());
    if (left <= 0 || round_is_over ||
        (by_limit && !(safety(i) == Safety::normal && score(i) < traits.every_link_below)))
      break;
    if (traits.picks == Picks::disjoint && (used[i] || used[i + 1])) continue;
    kept[i + 1] = 0, used[i] = used[i + 1] = 1, --left;
  }
  return kept;
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
