// The full-attention mass that each token will still receive: what only an oracle knows.
#pragma once
#include <vector>

#include "core/attention.hpp"
#include "core/session.hpp"

namespace kv {

/// Of one KV head, mean over its query heads. Everything is borrowed.
class FutureMass {
 public:
  /// `steps` are the newest tokens of every block: what is added at once must be what advance() takes off again, so
  /// that the same bits go. Those of the first block are past when anything is first scored, and never counted.
  FutureMass(const TraceHeader& trace, const PreparedLayer& layer, int kv_head, const std::vector<int>& steps);

  /// Queries of tokens up to `now`, the next step, are past from now on.
  void advance(int now);

  /// Mass that `token` receives from the recorded queries that are left.
  float of(int token) const { return static_cast<float>(left_[static_cast<std::size_t>(token)]); }

 private:
  /// Adds `sign` times the mass that queries of tokens (first, last] give.
  void add(int first, int last, double sign);

  const TraceHeader& trace_;
  const PreparedLayer& layer_;
  int kv_head_, now_;
  Attention attention_;
  std::vector<int> every_token_;
  std::vector<double> all_, left_;  // [tokens] from every recorded query, and from those to come
};

}  // namespace kv
