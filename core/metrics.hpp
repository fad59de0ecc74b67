// The metrics, once: unit, direction and formula as data, and their computation from a replay's per-query errors.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "core/replay.hpp"

namespace kv {

/// What a metric is; README's table and axis labels read this.
struct MetricDoc {
  const char* name;
  const char* label;
  const char* unit;
  const char* better;   // "lower", "higher" or ""
  const char* formula;  // one line
};
const std::vector<MetricDoc>& metric_docs();

/// Aggregates of one per-query quantity; percentiles interpolate linearly. Undefined (nothing to aggregate) is empty.
struct Summary {
  std::optional<double> mean, p50, p95, p99, max;
  std::optional<double> cvar95;              // mean of the worst 5 % (at least one query)
  std::vector<std::optional<double>> layer;  // mean per layer
};

/// Everything a row says about error. Sums are in double and in fixed order.
struct Metrics {
  std::optional<double> nmse;                     // the headline
  std::vector<std::optional<double>> nmse_layer;  // [layer]
  Summary rel_l2, cosine, lost_mass;
  std::optional<Summary> rel_l2_wo;                            // with wo in the trace
  std::optional<Summary> mass_tv;                              // when asked for
  int undefined_queries = 0;                                   // |o| = 0 but |d| > 0: left out of rel_l2
  std::vector<std::vector<double>> error2_sums, output2_sums;  // [layer][query head], summed over queries
  std::optional<double> early_ratio;  // nmse of the first third of layers over that of the rest
  bool early_heavy = false;           // early_ratio > 2: nmse is too kind to this policy
};

Metrics metrics_of(const ReplayResult& result);

/// |d| / |o| of every layer, query head and measured query; NaN where undefined (the layout of ReplayResult::error2).
std::vector<double> relative_errors(const ReplayResult& result);

/// Linear-interpolation percentile, p in [0, 100], of unsorted values; empty for none.
std::optional<double> percentile(std::vector<double> values, double p);

}  // namespace kv
