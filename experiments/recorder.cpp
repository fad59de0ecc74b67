#include "experiments/recorder.hpp"

#include <fmt/core.h>

#include <algorithm>

#include "core/error.hpp"
#include "core/metrics.hpp"
#include "experiments/progress.hpp"
#include "experiments/runner.hpp"
#include "experiments/series.hpp"

namespace kv {

namespace fs = std::filesystem;

Recorder::Recorder(Results& results, fs::path dir, int threads, std::string gpu)
    : results_(results), dir_(std::move(dir)), threads_(threads), gpu_(std::move(gpu)) {}

Recorded Recorder::record(const Point& point, Session& session, const DeviceOutcome& outcome) {
  Row row = make_row(point, session.header(), "ok", "");
  Recorded recorded;
  try {
    if (outcome.error) std::rethrow_exception(outcome.error);
    recorded.said = add_measured(row, point, session, outcome);
  } catch (const std::exception& error) {
    std::string message = error.what();
    std::ranges::replace(message, '\n', ' ');
    set_failed(row, message, exit_code(error));
    recorded = {fmt::format("error: {}", message), Failure{message, exit_code(error)}};
  }
  add_cost(row, {outcome.seconds, threads_, point.backend == "cuda" ? gpu_ : ""});
  results_.append(row);
  return recorded;
}

std::string Recorder::add_measured(Row& row, const Point& point, Session& session, const DeviceOutcome& outcome) {
  const ReplayResult& result = outcome.result;
  const Metrics metrics = metrics_of(result);
  add_result(row, point, session.header(), result, metrics, floor_of(point, session, outcome));
  if (point.keys.series) save_series(point, session.header(), result);
  const bool idle = point.policy->traits().compresses && !row["acted"].get<bool>();
  return fmt::format("nmse={} {}{}{}", metrics.nmse ? fmt::format("{:.4g}", *metrics.nmse) : "undefined",
                     human_bytes(row["bytes.cache_mean"].get<double>()), idle ? " (the policy never acted)" : "",
                     metrics.early_heavy ? " (early layers far worse: nmse is too kind)" : "");
}

void Recorder::save_series(const Point& point, const TraceHeader& header, const ReplayResult& result) const {
  const fs::path file = dir_ / "series" / (point.run + ".h5");
  try {
    fs::create_directories(file.parent_path());
    write_series(file, point.run, header, result);
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove(file.string() + ".part", ignored);
    throw ConfigError(fmt::format("--out: the series cannot be written: {}", error.what()));
  }
}

const NoiseFloor& Recorder::floor_of(const Point& point, Session& session, const DeviceOutcome& outcome) {
  const std::tuple key{point.keys.trace, point.keys.measure, point.backend};
  if (const auto at = floors_.find(key); at != floors_.end()) return at->second;
  NoiseFloor floor;
  if (std::ranges::all_of(session.header().layers, &LayerInfo::has_o)) {
    const Metrics metrics = metrics_of(outcome.floor ? *outcome.floor : noise_floor(session, point.settings.measured));
    floor = {metrics.nmse, metrics.rel_l2.mean};
  }
  return floors_[key] = floor;
}

}  // namespace kv
