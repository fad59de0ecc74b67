// Applying merges: weighted sums of rows, always from the rows as they were before the merge.
#pragma once
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "core/cache.hpp"
#include "core/dtype.hpp"
#include "core/policy.hpp"

namespace kv {

/// Collects the victims of one round of merging and writes their targets' new rows.
class FoldSums {
 public:
  explicit FoldSums(Cache& cache) : cache_(cache) {}

  /// Adds `victim` to plan.target, a slot that stays. Rows are read now.
  void add(const Fold& plan, int victim);

  /// The same with weights per channel of the key, [key_dim] each, in place of plan.key and plan.own_key.
  void add(const Fold& plan, int victim, std::span<const float> key_weights, std::span<const float> own_key_weights);

  /// Calls `change(target, sum)` for every target, which may change own weights and divisors.
  void adjust(const std::function<void(int target, FoldTarget& sum)>& change);

  /// Writes every target's rows, rounded to nearest even in `dtype`. Returns the targets whose key changed. Throws
  /// InternalError when a divisor is 0 or not finite.
  std::vector<int> write(Dtype dtype);

  /// Targets whose key was written with a weight outside [0, 1].
  int weights_outside() const { return weights_outside_; }

  /// Targets whose value was written with weights that do not add up to 1: attention mass is made up or lost.
  int unbalanced() const { return unbalanced_; }

 private:
  struct Target {
    FoldTarget sum;
    std::vector<float> key, value;            // weighted sums of the victims' rows; empty while all weights are 0
    std::vector<float> key_weights;           // of each victim
    std::vector<float> channel, own_channel;  // sums of the victims' weights per channel, and the target's own
  };
  Target& target(const Fold& plan, int victim);
  void write_key(int slot, const Target& target, Dtype dtype);

  Cache& cache_;
  std::map<int, Target> targets_;
  int weights_outside_ = 0, unbalanced_ = 0;
};

}  // namespace kv
