// Mean and covariance of a head's queries so far, and what they become at positions to come (Expected Attention, Devoto
// et al. 2025, arXiv:2510.00636).
#pragma once
#include <vector>

#include "core/trace.hpp"

namespace kv {

class QueryStatistics {
 public:
  QueryStatistics(const ModelInfo& model, int group);

  /// Adds one token's unrotated queries, head by head of the group: query(g) is [head_dim].
  template <class Query>
  void add(Query query) {
    ++count_;
    for (int g = 0; g < group_; ++g) add_one(g, query(g));
  }

  /// Rotates the mean and the population covariance by the mean of the rotations to positions [first, first + horizon):
  /// mean() = R mu, covariance() = R Sigma R^T. Zeros before the first query.
  void look_ahead(int first, int horizon);

  const float* mean() const { return mean_.data(); }              // [group][head_dim]
  const float* covariance() const { return covariance_.data(); }  // [group][head_dim][head_dim]

 private:
  void add_one(int g, const float* query);

  const ModelInfo& model_;
  int group_, count_ = 0;
  std::vector<double> sum_, outer_;       // [group][d], [group][d][d]
  std::vector<float> mean_, covariance_;  // the same shapes
};

}  // namespace kv
