#include "core/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

namespace kv {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

std::vector<double> defined(std::span<const double> values) {
  std::vector<double> out;
  std::copy_if(values.begin(), values.end(), std::back_inserter(out), [](double x) { return !std::isnan(x); });
  return out;
}

std::optional<double> mean(const std::vector<double>& values) {
  if (values.empty()) return {};
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

/// Percentile of sorted values.
double sorted_percentile(const std::vector<double>& sorted, double p) {
  const double place = p / 100 * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

/// `values` is [layer][...] with NaN where undefined.
Summary summarise(const std::vector<double>& values, int layers) {
  Summary s;
  const std::size_t per_layer = values.size() / static_cast<std::size_t>(layers);
  for (std::size_t l = 0; l < static_cast<std::size_t>(layers); ++l)
    s.layer.push_back(mean(defined(std::span(values).subspan(l * per_layer, per_layer))));
  std::vector<double> all = defined(values);
  s.mean = mean(all);
  if (all.empty()) return s;
  std::sort(all.begin(), all.end());
  s.p50 = sorted_percentile(all, 50), s.p95 = sorted_percentile(all, 95), s.p99 = sorted_percentile(all, 99),
  s.max = all.back();
  const auto worst = static_cast<std::ptrdiff_t>(std::ceil(0.05 * static_cast<double>(all.size())));
  s.cvar95 = mean({all.end() - worst, all.end()});
  return s;
}

std::optional<double> root_ratio(double error2, double output2) {
  if (output2 > 0) return std::sqrt(error2 / output2);
  return error2 == 0 ? std::optional(0.0) : std::nullopt;
}

/// nmse over layers [first, last) from per-head sums.
std::optional<double> nmse_of(const Metrics& m, std::size_t first, std::size_t last) {
  double error2 = 0, output2 = 0;
  for (std::size_t l = first; l < last; ++l)
    for (std::size_t h = 0; h < m.error2_sums[l].size(); ++h)
      error2 += m.error2_sums[l][h], output2 += m.output2_sums[l][h];
  return root_ratio(error2, output2);
}

std::vector<double> ratios(const std::vector<double>& error2, const std::vector<double>& output2) {
  std::vector<double> out(error2.size());
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = root_ratio(error2[i], output2[i]).value_or(nan);
  return out;
}

}  // namespace

const std::vector<MetricDoc>& metric_docs() {
  static const std::vector<MetricDoc> docs{
      {"nmse", "normalised error", "", "lower",
       "sqrt( sum |o' - o|^2 / sum |o|^2 ) over all layers, query heads and measured queries"},
      {"rel_l2", "relative error of a query", "", "lower",
       "|o' - o| / |o| per layer, query head and query; 0 when both are 0, left out when only |o| is"},
      {"cosine", "cosine distance of a query", "", "lower", "1 - cos(o', o) per layer, query head and query"},
      {"lost_mass", "lost attention mass of a query", "", "lower",
       "full-attention probability of the tokens that no slot stands for"},
      {"rel_l2_wo", "relative error after W_o", "", "lower",
       "|W_o (o' - o)| / |W_o o| per layer and query, all heads together; needs wo in the trace"},
      {"mass_tv", "moved attention mass of a query", "", "lower",
       "1/2 (sum over slots |own mass - full mass of its tokens| + lost mass); with metrics: mass"},
      {"bytes.cache_mean", "mean bytes held", "bytes", "lower",
       "mean over the measured steps of the slots attended to x bytes of a slot, all layers and heads"},
      {"bytes.cache_peak", "peak bytes held", "bytes", "lower", "maximum over the measured steps of the same"},
      {"slots.decode_mean", "mean slots held in decode", "slots per KV head", "lower",
       "mean over decode steps, layers and KV heads of the slots attended to"},
      {"us.step", "time of a decode step", "us", "lower",
       "append + attend + observe + score + select + compact, summed over layers and heads"},
      {"us.policy_overhead", "policy time over attention time", "", "lower",
       "(observe + score + select + compact) / attend, from medians over decode steps"},
  };
  return docs;
}

std::optional<double> percentile(std::vector<double> values, double p) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  return sorted_percentile(values, p);
}

std::vector<double> relative_errors(const ReplayResult& result) { return ratios(result.error2, result.output2); }

Metrics metrics_of(const ReplayResult& r) {
  Metrics m;
  const std::size_t queries = r.measured.size();
  auto e = r.error2.begin(), o = r.output2.begin();
  for (int l = 0; l < r.layers; ++l) {
    m.error2_sums.emplace_back(), m.output2_sums.emplace_back();
    for (int h = 0; h < r.query_heads; ++h) {
      const auto n = static_cast<std::ptrdiff_t>(queries);
      m.error2_sums.back().push_back(std::accumulate(e, e + n, 0.0)), e += n;
      m.output2_sums.back().push_back(std::accumulate(o, o + n, 0.0)), o += n;
    }
  }
  const auto layers = static_cast<std::size_t>(r.layers), early = layers / 3;
  m.nmse = nmse_of(m, 0, layers);
  for (std::size_t l = 0; l < layers; ++l) m.nmse_layer.push_back(nmse_of(m, l, l + 1));
  const auto first = early > 0 ? nmse_of(m, 0, early) : std::nullopt, rest = nmse_of(m, early, layers);
  if (first && rest && *rest > 0) m.early_ratio = *first / *rest;
  m.early_heavy = m.early_ratio.value_or(0) > 2;
  const std::vector<double> relative = relative_errors(r);
  m.undefined_queries =
      static_cast<int>(std::count_if(relative.begin(), relative.end(), [](double x) { return std::isnan(x); }));
  m.rel_l2 = summarise(relative, r.layers);
  m.cosine = summarise(r.cosine, r.layers);
  m.lost_mass = summarise(r.lost_mass, r.layers);
  if (!r.wo_error2.empty()) m.rel_l2_wo = summarise(ratios(r.wo_error2, r.wo_output2), r.layers);
  if (!r.mass_tv.empty()) m.mass_tv = summarise(r.mass_tv, r.layers);
  return m;
}

}  // namespace kv
