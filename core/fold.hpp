// Applying merges: convex sums of rows, always from the rows as they were before the merge.
#pragma once
#include <map>
#include <vector>

#include "core/cache.hpp"
#include "core/dtype.hpp"
#include "core/policy.hpp"

namespace kv {

/// Collects the victims of one round of merging and writes their targets' new rows.
class FoldSums {
 public:
  explicit FoldSums(Cache& cache) : cache_(cache) {}

  /// Adds `victim` with `plan` (whose target is a slot that stays). Rows are read now.
  void add(const Fold& plan, int victim);

  /// Writes every target's rows, rounded to nearest even in `dtype`.
  /// Returns the targets whose key changed.
  std::vector<int> write(Dtype dtype);

 private:
  struct Target {
    std::vector<float> key, value;  // weighted sums of the victims' rows; empty while all weights are 0
    float key_weight = 0, value_weight = 0, own_key = 1, own_value = 1;
  };
  Cache& cache_;
  std::map<int, Target> targets_;
};

}  // namespace kv
