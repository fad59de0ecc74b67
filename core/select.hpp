// Which slots stay: the one rule for every policy (design section 4).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/policy.hpp"
#include "core/spec.hpp"

namespace kv {

/// How safe a slot is; ordered.
enum class Safety : std::uint8_t { normal, protected_, sink };

/// One head's slots in token order, ready to be selected from.
struct Candidates {
  std::vector<float> score;    // [slots] higher = keep
  std::vector<Safety> safety;  // [slots]
  std::size_t size() const { return score.size(); }
};

/// Candidates from raw scores in token order: the scores `sink` (+infinity) and `protect` (largest float) mark safety,
/// as do the engine's own `protect` settings. `token` ascends.
Candidates classify(std::span<const float> score, std::span<const int> token, const Protect& protect, int now);

/// The same for the scores of links: safety is that of link i, the safer of its two slots.
Candidates classify_links(std::span<const float> score, std::span<const int> token, const Protect& protect, int now);

/// Adds another head's scores (layer scope): scores add up, the higher safety wins.
void combine(Candidates& sum, const Candidates& other);

/// Marks exactly min(budget, size) of `candidates` as kept: protected ones, then the best scores, the older of equals.
/// When more are protected than fit: the first sinks (leaving one slot for another), then the newest protected.
/// Returns kept[i] in token order.
std::vector<std::uint8_t> select(const Candidates& candidates, int budget);

/// The same for links: candidate i is the link of slot i with its right neighbour (lower = join first; the last one is
/// no link). Joins links until `budget` slots are left, of equals the older first; under Picks::disjoint as many of
/// those as share no slot. Links of protected slots are joined, the oldest first, when nothing else is left to join;
/// links from a sink never are, but for sinks beyond budget - 1. With `every_link_below` all links that score lower are
/// joined whatever the budget, but for safe ones. The right slot of a joined link goes.
std::vector<std::uint8_t> select_links(const Candidates& candidates, int budget, const Traits& traits);

}  // namespace kv
