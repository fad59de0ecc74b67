// Stored words of a trace <-> float32. Loops without branches: the compiler vectorises them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/dtype.hpp"

namespace kv {

/// Widens `words`, stored as `dtype`, into `values` (as many as there are words). Exact.
void widen(Dtype dtype, std::span<const std::byte> words, float* values);

/// Rounds `values` to words of `dtype`, ties to even; what is too large becomes infinite.
std::vector<std::byte> narrow(Dtype dtype, std::span<const float> values);

/// Index of the first word that is an infinity or NaN.
std::optional<std::uint64_t> first_not_finite(Dtype dtype, std::span<const std::byte> words);

}  // namespace kv
