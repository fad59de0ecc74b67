// Budgets: how many slots a KV head may hold after a compression, and what a slot costs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/trace.hpp"

namespace kv {

/// A budget as asked: a share of the prompt ("20%", 0.2), slots per KV head ("512"), or bytes of all recorded layers
/// and heads together, metadata included ("64MiB").
struct Budget {
  enum class Kind { share, slots, bytes } kind = Kind::share;
  double share = 1;
  std::int64_t amount = 0;  // slots or bytes
  std::string text = "100%";
};

/// What one slot costs in bytes, by purpose.
struct SlotBytes {
  std::size_t payload = 0;   // key and value in the trace's dtype
  std::size_t metadata = 0;  // position, the policy's state, multiplicity or bias when in use
  std::size_t per_head = 0;  // the policy's state per KV head
  std::size_t slot() const { return payload + metadata; }
};

/// Reads one of the three spellings. A whole number is slots (1 = one slot); a number with a point is a share in (0, 1]
/// (1.0 = everything). Throws ConfigError showing the spellings.
Budget parse_budget(const std::string& text);

/// Slots per KV head: shares are of the prompt's tokens (of all tokens without a prompt), at least 1 slot. Throws
/// ConfigError when a budget in bytes holds less than one slot in every head.
int slots_of(const Budget& budget, const TraceHeader& trace, const SlotBytes& bytes);

}  // namespace kv
