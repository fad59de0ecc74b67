// Rows of choices among which every pair of choices of two axes occurs: a cover far smaller than the product of all.
#pragma once
#include <array>
#include <cstddef>
#include <set>
#include <vector>

namespace kv::test {

using Pair = std::array<int, 4>;  // axis, its choice, a later axis, its choice

inline std::set<Pair> all_pairs(const std::vector<int>& choices) {
  std::set<Pair> pairs;
  const int axes = static_cast<int>(choices.size());
  for (int a = 0; a < axes; ++a)
    for (int b = a + 1; b < axes; ++b)
      for (int i = 0; i < choices[static_cast<std::size_t>(a)]; ++i)
        for (int j = 0; j < choices[static_cast<std::size_t>(b)]; ++j) pairs.insert({a, i, b, j});
  return pairs;
}

/// The pairs of axis `axis` at `choice` with the axes of `row` that are chosen (not -1).
inline std::vector<Pair> pairs_with(const std::vector<int>& row, int axis, int choice) {
  std::vector<Pair> pairs;
  for (int other = 0; other < static_cast<int>(row.size()); ++other) {
    const int theirs = row[static_cast<std::size_t>(other)];
    if (other == axis || theirs < 0) continue;
    pairs.push_back(other < axis ? Pair{other, theirs, axis, choice} : Pair{axis, choice, other, theirs});
  }
  return pairs;
}

/// The choice for `axis` that adds most missing pairs to `row`; of equal ones that with the fewest `uses` so far.
inline int best_choice(const std::vector<int>& row, int axis, const std::vector<int>& uses,
                       const std::set<Pair>& missing) {
  int best = 0;
  std::size_t most = 0;
  for (int choice = 0; choice < static_cast<int>(uses.size()); ++choice) {
    std::size_t fresh = 0;
    for (const Pair& pair : pairs_with(row, axis, choice)) fresh += missing.count(pair);
    const bool fewer = uses[static_cast<std::size_t>(choice)] < uses[static_cast<std::size_t>(best)];
    if (fresh > most || (fresh == most && fewer)) best = choice, most = fresh;
  }
  return best;
}

/// Greedy: each row begins with a pair that is still missing, then each axis takes its best choice. `choices` says how
/// many each axis has.
inline std::vector<std::vector<int>> pairwise_cover(const std::vector<int>& choices) {
  std::set<Pair> missing = all_pairs(choices);
  std::vector<std::vector<int>> rows, uses;
  for (const int n : choices) uses.emplace_back(static_cast<std::size_t>(n), 0);
  while (!missing.empty()) {
    const Pair first = *missing.begin();
    std::vector<int> row(choices.size(), -1);
    row[static_cast<std::size_t>(first[0])] = first[1], row[static_cast<std::size_t>(first[2])] = first[3];
    for (std::size_t axis = 0; axis < row.size(); ++axis) {
      if (row[axis] < 0) row[axis] = best_choice(row, static_cast<int>(axis), uses[axis], missing);
      ++uses[axis][static_cast<std::size_t>(row[axis])];
    }
    for (std::size_t axis = 0; axis < row.size(); ++axis)
      for (const Pair& pair : pairs_with(row, static_cast<int>(axis), row[axis])) missing.erase(pair);
    rows.push_back(row);
  }
  return rows;
}

}  // namespace kv::test
