#include "experiments/runner.hpp"

#include <fmt/core.h>
#include <fmt/format.h>
#include <signal.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "core/error.hpp"
#include "experiments/manifest.hpp"
#include "experiments/plan.hpp"
#include "experiments/progress.hpp"
#include "experiments/recorder.hpp"
#include "experiments/results.hpp"
#include "experiments/row.hpp"
#include "experiments/schedule.hpp"
#include "kernels/engine.hpp"

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

/// What the GPUs are called, when points run on them; "" when none does.
std::string gpu_name(const Plan& plan) {
  if (std::ranges::none_of(plan.points, [](const Point& point) { return point.backend == "cuda"; })) return "";
  std::set<std::string> names;
  for (const DeviceInfo& device : devices()) names.insert(device.name);
  return fmt::format("{}", fmt::join(names, ", "));
}

/// Runs the points of one plan into one output folder.
class Runner {
  using Points = std::vector<const Point*>;

 public:
  Runner(Plan& plan, const RunOptions& options, fs::path dir, int threads)
      : plan_(plan),
        options_(options),
        dir_(std::move(dir)),
        results_(dir_),
        recorder_(results_, dir_, threads, gpu_name(plan)) {}

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
    for (auto first = pending_.begin(); first != pending_.end() && !guard_.interrupted();) {
      const std::string trace = (*first)->keys.trace;
      const auto last = std::find_if(first, pending_.end(), [&](const Point* p) { return p->keys.trace != trace; });
      std::unique_ptr<Session>& session = plan_.sessions.at(trace);
      run_trace(*session, {first, last}, progress);
      session.reset();  // gives the memory of its layers back
      first = last;
    }
    counts_.left = pending_.size() - counts_.ok - counts_.failed;
  }

  /// The pending points of one trace: those for the GPU together, then the others one by one.
  void run_trace(Session& session, Points points, Progress& progress) {
    const auto middle = std::ranges::stable_partition(points, [](const Point* p) { return p->backend == "cuda"; });
    run_on_device(session, Points(points.begin(), middle.begin()), progress);
    for (const Point* point : middle) {
      if (guard_.interrupted()) return;
      finish(*point, session, replay_here(session, *point), progress);
    }
  }

  void run_on_device(Session& session, const Points& points, Progress& progress) {
    std::vector<DevicePoint> given;
    for (const Point* point : points) given.push_back({point->entry, point->policy.get(), &point->settings});
    if (points.empty() || guard_.interrupted()) return;
    std::size_t ended = 0;
    std::exception_ptr broken;  // the output folder cannot be written: not the engine's to handle
    replay_on_device(session, given, {options_.device_memory}, [&](std::size_t i, DeviceOutcome outcome) {
      ++ended;
      try {
        finish(*points[i], session, outcome, progress);
      } catch (...) {
        broken = std::current_exception();
      }
      return !broken && !guard_.interrupted();
    });
    if (broken) std::rethrow_exception(broken);
    KV_CHECK(ended == points.size() || guard_.interrupted());
  }

  static DeviceOutcome replay_here(Session& session, const Point& point) {
    const auto start = Clock::now();
    DeviceOutcome outcome;
    try {
      outcome.result = replay(session, *point.entry, *point.policy, point.settings);
    } catch (const std::exception&) {
      outcome.error = std::current_exception();
    }
    outcome.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    return outcome;
  }

  /// Writes the row of a point that ended on either engine, and says so.
  void finish(const Point& point, Session& session, const DeviceOutcome& outcome, Progress& progress) {
    const Recorded recorded = recorder_.record(point, session, outcome);
    ++(recorded.failure ? counts_.failed : counts_.ok);
    if (recorded.failure) failures_[&point] = *recorded.failure;
    progress.finished(fmt::format("{} {}", label(plan_, point), recorded.said), outcome.seconds);
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

  Plan& plan_;
  const RunOptions& options_;
  fs::path dir_;
  Results results_;
  Recorder recorder_;
  SignalGuard guard_;
  Points pending_, skips_;
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
