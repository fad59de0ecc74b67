// The KV cache of one head: slots with their rows, positions and multiplicities, and which slot stands for which token.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace kv {

/// Slots live in a dense array [0, size) in no particular order, so that evicting one moves at most one row; `order`
/// lists them by token. Rows hold float32 values that the trace's dtype can store.
class Cache {
 public:
  /// For tokens 0 .. tokens-1 of a sequence; a `slot_limit` is the most slots that will be held at once.
  Cache(int key_dim, int value_dim, int tokens, int slot_limit);

  int size() const { return static_cast<int>(token_.size()); }
  int key_dim() const { return key_dim_; }
  int value_dim() const { return value_dim_; }

  float* key(int slot) { return key_.data() + static_cast<std::size_t>(slot) * static_cast<std::size_t>(key_dim_); }
  float* value(int slot) {
    return value_.data() + static_cast<std::size_t>(slot) * static_cast<std::size_t>(value_dim_);
  }
  const float* keys() const { return key_.data(); }                      // [size][key_dim]
  const float* values() const { return value_.data(); }                  // [size][value_dim]
  std::span<const int> tokens() const { return token_; }                 // [size] token index of each slot
  std::span<const int> multiplicities() const { return multiplicity_; }  // [size] tokens each slot counts as
  std::span<const int> order() const { return order_; }                  // slots, ascending by token
  std::span<const int> rank() const { return rank_; }                    // [size] place of each slot in `order`

  /// Slot of a token that still has its own, else -1.
  int slot_of(int token) const { return slot_of_token_[static_cast<std::size_t>(token)]; }

  /// Token of the slot that stands for `token` (its own, or the one it was folded into), or -1 when none does.
  int standing_for(int token) const;

  /// Number of slots whose token is at most `token`.
  int count_up_to(int token) const;

  /// Adds one slot; tokens arrive in ascending order.
  void append(int token, const float* key, const float* value);

  /// `into` now also stands for everything `from` stood for; rows are the caller's. `from` must then be removed.
  void adopt(int into, int from);

  /// `into` counts as `n` tokens from now on.
  void set_multiplicity(int into, int n) { multiplicity_[static_cast<std::size_t>(into)] = n; }

  /// Removes the slots from `size` on: the newest ones, before anything else was removed since they came.
  void truncate(int size);

  /// Removes `victims` (ascending by slot). `moved(from, to)` is told of every row that fills a hole.
  void remove(std::span<const int> victims, const std::function<void(int from, int to)>& moved);

 private:
  int key_dim_, value_dim_;
  std::vector<float> key_, value_;
  std::vector<int> token_, multiplicity_, rank_;  // [size]
  std::vector<int> order_;
  std::vector<int> slot_of_token_;  // [tokens]
  std::vector<int> parent_;         // [tokens] itself, the token it was folded into, or -1 = lost
};

}  // namespace kv
