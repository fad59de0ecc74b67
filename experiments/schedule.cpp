#include "experiments/schedule.hpp"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>

#include "experiments/progress.hpp"
#include "experiments/text_table.hpp"

namespace kv {
namespace {

const char* name_of(Action action) {
  switch (action) {
    case Action::run:
      return "run";
    case Action::done:
      return "done";
    case Action::failed:
      return "failed";
    case Action::skip:
    case Action::skipped:
      break;
  }
  return "skip";
}

/// Roughly what replaying the trace takes: prepared layers (held up to the session's limit), full attention of the
/// measured queries and the result's per-query numbers.
double memory_estimate(const TraceHeader& header, std::size_t measured) {
  const ModelInfo& m = header.model;
  double layers = 0;
  for (std::size_t i = 0; i < header.layers.size(); ++i) {
    const auto floats = [&](const char* dataset) {
      return static_cast<double>(header.bytes(static_cast<int>(i), dataset) / size_of(header.dtype) * sizeof(float));
    };
    layers += 2 * floats("q") + 2 * floats("k") + floats("v") + floats("o") + floats("wo");  // q and k also rotated
  }
  const double session_limit = 2.0 * 1024 * 1024 * 1024;
  const double queries = static_cast<double>(header.layers.size()) * m.query_heads * static_cast<double>(measured);
  const double reference = queries * (4.0 * m.value_dim + 8.0);
  const double result = queries * 6 * 8.0;
  return std::min(layers, session_limit) + reference + result;
}

}  // namespace

Action action_of(const Point& point, const RowStates& rows, const RunOptions& options) {
  const auto at = rows.find(point.run);
  const RowState* row = at == rows.end() ? nullptr : &at->second;
  if (!point.invalid.empty()) return row == nullptr || options.force ? Action::skip : Action::skipped;
  if (options.force || row == nullptr) return Action::run;
  if (row->status == "error" && !options.retry_failed) return Action::failed;
  return is_done(point, row) ? Action::done : Action::run;
}

void print_plan(const Plan& plan, const RowStates& rows, const RunOptions& options) {
  TextTable table(1);
  table[0] = {"#", "to do", "run"};
  std::vector<std::string> keys = plan.varying;
  for (const char* key : {"policy", "trace"})
    if (std::ranges::find(keys, key) == keys.end()) keys.insert(keys.begin(), key);
  table[0].insert(table[0].end(), keys.begin(), keys.end());
  std::size_t runs = 0, done = 0;
  std::map<std::string, std::size_t> measured;
  for (const Point& point : plan.points) {
    const Action action = action_of(point, rows, options);
    runs += action == Action::run;
    done += action == Action::done;
    table.push_back({std::to_string(table.size()), name_of(action), point.run});
    for (const std::string& key : keys)
      table.back().push_back(key == "trace" ? trace_label(plan, point.keys.trace) : value_text(point, key));
    measured[point.keys.trace] = std::max(measured[point.keys.trace], point.settings.measured.size());
  }
  fmt::print("{}", columns(table));
  fmt::print("\n{} points ({} duplicates left out): {} to run, {} done, {} neither\n", plan.points.size(),
             plan.duplicates, runs, done, plan.points.size() - runs - done);
  for (const Point& point : plan.points)
    if (!point.invalid.empty()) fmt::print("skip {}: {}\n", point.run, point.invalid);
  for (const auto& [trace, queries] : measured) {
    const TraceHeader& header = plan.sessions.at(trace)->header();
    fmt::print("{}: {} tokens, {} layers, needs about {} of memory\n", trace, header.tokens, header.layers.size(),
               human_bytes(memory_estimate(header, queries)));
  }
}

}  // namespace kv
