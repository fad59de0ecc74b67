#include "core/future_mass.hpp"

#include <numeric>

#include "core/query_rows.hpp"

namespace kv {

FutureMass::FutureMass(const TraceHeader& trace, const PreparedLayer& layer, int kv_head, const std::vector<int>& steps)
    : trace_(trace),
      layer_(layer),
      kv_head_(kv_head),
      now_(steps.front()),
      every_token_(static_cast<std::size_t>(trace.tokens)),
      left_(static_cast<std::size_t>(trace.tokens)) {
  std::iota(every_token_.begin(), every_token_.end(), 0);
  for (int last = steps.front(); const int step : steps) add(last, step, 1), last = step;
  all_ = left_;
}

void FutureMass::advance(int now) {
  add(now_, now, -1);
  now_ = now;
  for (std::size_t t = 0; t < left_.size(); ++t)  // what rounding leaves of nothing is nothing
    if (left_[t] < 1e-12 * all_[t]) left_[t] = 0;
}

void FutureMass::add(int first, int last, double sign) {
  std::vector<int> rows;
  for (int t = first + 1; t <= last; ++t)
    if (layer_.row_of_token[static_cast<std::size_t>(t)] >= 0) rows.push_back(t);
  if (rows.empty()) return;
  const ModelInfo& m = trace_.model;
  const std::vector<float> q = gather_queries(m, layer_, layer_.q_rotated, kv_head_, rows);
  const double share = sign / m.group();
  attention_.run(
      keys_of(trace_, layer_, kv_head_, every_token_), rule_of(m, layer_, kv_head_),
      {q.data(), rows.data(), static_cast<int>(rows.size()), m.group()}, 0, trace_.tokens, nullptr, nullptr,
      [&](const AttentionTile& tile) {
        for (int r = 0; r < tile.rows * m.group(); ++r)
          for (int c = 0; c < tile.columns; ++c)
            left_[static_cast<std::size_t>(c)] +=
                share * static_cast<double>(
                            tile.probability[static_cast<std::size_t>(r) * tile.stride + static_cast<std::size_t>(c)]);
      });
}

}  // namespace kv
