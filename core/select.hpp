// Which slots stay: the one rule for every policy (design section 4).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

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

/// Adds another head's scores (layer scope): scores add up, the higher safety wins.
void combine(Candidates& sum, const Candidates& other);

/// Marks exactly min(budget, size) of `candidates` as kept: protected ones, then the best scores, the older of equals.
/// When more are protected than fit: the first sinks (leaving one slot for another), then the newest protected.
/// Returns kept[i] in token order.
std::vector<std::uint8_t> select(const Candidates& candidates, int budget);

}  // namespace kv
