#include "experiments/runner.hpp"

#include <fmt/core.h>
#include <signal.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>

#include "core/error.hpp"
#include "core/metrics.hpp"
#include "experiments/manifest.hpp"
#include "experiments/plan.hpp"
#include "experiments/progress.hpp"
#include "experiments/results.hpp"
#include "experiments/row.hpp"
#include "experiments/schedule.hpp"
#include "experiments/series.hpp"

namespace kv {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int interrupted_code = 130;
volatile sig_atomic_t interrupts = 0;

extern "C" void on_interrupt(int) {
  if (interrupts > 0) _exit(interrupted_code);
  interrupts = 1;
}

/// While it lives, Ctrl-C asks the sweep to stop after the running point, a second one ends the process at once, and a
/// reader of our output that goes away does not.
class SignalGuard {
 public:
  SignalGuard() {
    interrupts = 0;
    struct sigaction action {};
    action.sa_handler = on_interrupt;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, &old_int_);
    sigaction(SIGTERM, &action, &old_term_);
    action.sa_handler = SIG_IGN;
    sigaction(SIGPIPE, &action, &old_pipe_);
  }
  ~SignalGuard() {
    sigaction(SIGINT, &old_int_, nullptr);
    sigaction(SIGTERM, &old_term_, nullptr);
    sigaction(SIGPIPE, &old_pipe_, nullptr);
  }
  bool interrupted() const { return interrupts > 0; }

 private:
  struct sigaction old_int_ {
  }, old_term_{}, old_pipe_{};
};

struct Counts {
  std::size_t ok = 0, failed = 0, done = 0, skipped = 0, left = 0, failed_before = 0;
};

/// Why a point has no good row: from this run, or from the row of an earlier one.
struct Failure {
  std::string message;
  int code;
};

/// Runs the points of one plan into one output folder.
class Runner {
 public:
  Runner(Plan& plan, const RunOptions& options, fs::path dir, int threads)
      : plan_(plan), options_(options), dir_(std::move(dir)), threads_(threads), results_(dir_) {}

  Results& results() { return results_; }

  /// Returns the exit code.
  int run() {
    sort_points();
    for (const Point* point : skips_)
      results_.append(make_row(*point, plan_.header(*point), "skipped", point->invalid));
    run_all();
    results_.compact();
    print_end();
    if (guard_.interrupted()) return interrupted_code;
    return failures_.empty() ? 0 : failures_.begin()->second.code;
  }

 private:
  void sort_points() {
    for (const Point& point : plan_.points) {
      const Action action = action_of(point, results_.rows(), options_);
      if (action == Action::run) pending_.push_back(&point);
      if (action == Action::skip) skips_.push_back(&point);
      counts_.done += action == Action::done;
      counts_.skipped += action == Action::skip || action == Action::skipped;
      if (action != Action::failed) continue;
      const RowState& row = results_.rows().at(point.run);
      failures_[&point] = {row.error, row.error_code};
      ++counts_.failed_before;
    }
  }

  void run_all() {
    if (pending_.empty()) return;
    Progress progress(pending_.size());
    for (std::size_t i = 0; i < pending_.size(); ++i) {
      if (guard_.interrupted()) {
        counts_.left = pending_.size() - i;
        return;
      }
      const Point& point = *pending_[i];
      const Clock::time_point start = Clock::now();
      const std::string line = run_point(point, start);
      progress.finished(fmt::format("{} {}", label(plan_, point), line), seconds_since(start));
      const bool last_of_trace = i + 1 == pending_.size() || pending_[i + 1]->keys.trace != point.keys.trace;
      if (!last_of_trace) continue;
      floors_.clear();
      plan_.sessions.at(point.keys.trace).reset();  // gives the memory of its layers back
    }
  }

  /// Replays one point and appends its row, an error's too. Returns what the progress line says of it.
  std::string run_point(const Point& point, Clock::time_point start) {
    Row row = make_row(point, plan_.header(point), "ok", "");
    std::string said;
    try {
      said = replay_into(row, point, start);
      ++counts_.ok;
    } catch (const std::exception& error) {
      std::string message = error.what();
      std::ranges::replace(message, '\n', ' ');
      set_failed(row, message, exit_code(error));
      row["seconds"] = seconds_since(start);
      said = fmt::format("error: {}", message);
      failures_[&point] = {message, exit_code(error)};
      ++counts_.failed;
    }
    results_.append(row);
    return said;
  }

  std::string replay_into(Row& row, const Point& point, Clock::time_point start) {
    Session& session = *plan_.sessions.at(point.keys.trace);
    const ReplayResult result = replay(session, *point.entry, *point.policy, point.settings);
    const Metrics metrics = metrics_of(result);
    add_result(row, point, session.header(), result, metrics, floor_of(session, point),
               {seconds_since(start), threads_});
    if (point.keys.series) save_series(point, session.header(), result);
    const bool idle = point.policy->traits().compresses && !row["acted"].get<bool>();
    return fmt::format("nmse={} {}{}{}", metrics.nmse ? fmt::format("{:.4g}", *metrics.nmse) : "undefined",
                       human_bytes(row["bytes.cache_mean"].get<double>()), idle ? " (the policy never acted)" : "",
                       metrics.early_heavy ? " (early layers far worse: nmse is too kind)" : "");
  }

  void save_series(const Point& point, const TraceHeader& header, const ReplayResult& result) const {
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

  const NoiseFloor& floor_of(Session& session, const Point& point) {
    const auto [at, fresh] = floors_.try_emplace(point.keys.measure);
    const auto& layers = session.header().layers;
    if (fresh && std::ranges::all_of(layers, &LayerInfo::has_o)) {
      const Metrics metrics = metrics_of(noise_floor(session, point.settings.measured));
      at->second = {metrics.nmse, metrics.rel_l2.mean};
    }
    return at->second;
  }

  /// What was done on stdout; the first of the failures on stderr.
  void print_end() const {
    std::string text = fmt::format("{} ran", counts_.ok + counts_.failed);
    const auto add = [&](std::size_t n, const char* what) {
      if (n > 0) text += fmt::format(", {} {}", n, what);
    };
    add(counts_.failed, "of them failed");
    add(counts_.done, "already done");
    add(counts_.failed_before, "failed before (--retry-failed runs them again)");
    add(counts_.skipped, "skipped as invalid");
    add(counts_.left, "left after the interrupt (the same command goes on)");
    say(stdout,
        fmt::format("{}; open-loop replay: recorded inputs drive every layer; results in {}\n", text, dir_.string()));
    if (failures_.empty()) return;
    const auto& [point, failure] = *failures_.begin();
    const std::size_t n = failures_.size();
    say(stderr, fmt::format("kvreplay: {}{}: {}\n", n > 1 ? fmt::format("{} points failed, the first is ", n) : "",
                            label(plan_, *point), failure.message));
  }

  static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  Plan& plan_;
  const RunOptions& options_;
  fs::path dir_;
  int threads_;
  Results results_;
  SignalGuard guard_;
  std::vector<const Point*> pending_, skips_;
  std::map<std::string, NoiseFloor> floors_;  // of the present trace, by replay.measure
  Counts counts_;
  std::map<const Point*, Failure> failures_;  // in the plan's order
};

}  // namespace

int exit_code(const std::exception& error) {
  if (dynamic_cast<const ConfigError*>(&error) != nullptr) return 2;
  if (dynamic_cast<const TraceError*>(&error) != nullptr) return 3;
  if (dynamic_cast<const CudaError*>(&error) != nullptr) return 4;
  return 1;
}

int run_sweep(const RunOptions& options) {
  std::unique_ptr<tbb::global_control> limit;
  if (options.jobs > 0)
    limit = std::make_unique<tbb::global_control>(tbb::global_control::max_allowed_parallelism,
                                                  static_cast<std::size_t>(options.jobs));
  const int cores = tbb::this_task_arena::max_concurrency();
  const int threads = options.jobs > 0 ? std::min(options.jobs, cores) : cores;
  const Config config = read_config(options.config, options.overrides);
  const fs::path dir = options.out.value_or(fs::path("out") / options.config.stem());
  Plan plan = make_plan(config, options.only);
  if (options.dry_run) {
    print_plan(plan, read_rows(dir), options);
    return 0;
  }
  Runner runner(plan, options, dir, threads);
  write_manifest(dir, config, plan, options.argv, threads);
  return runner.run();
}

}  // namespace kv
