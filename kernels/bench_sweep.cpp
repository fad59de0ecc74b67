#include "kernels/bench_sweep.hpp"

#include <fmt/core.h>

#include <chrono>

#include "kernels/bench_work.hpp"
#include "kernels/engine.hpp"

namespace kv {
namespace {

constexpr const char* names[] = {"h2o",   "tova",        "streaming_llm", "snapkv", "keydiff",
                                 "knorm", "weighted_kv", "cam",           "random", "lagkv"};
constexpr int layers = 32, distinct_layers = 4, tokens = 8192, decode = 256, budgets = 10;
constexpr std::size_t checked = 4;  // h2o at the fifth budget

/// A policy as published, at one budget.
struct SweepPoint {
  const PolicyEntry* entry;
  std::shared_ptr<BoundPolicy> policy;
  ReplaySettings settings;
};

/// Budgets of 5 to 50 % of the prompt; nothing is timed twice (timing.repeats 0).
std::vector<SweepPoint> sweep_points() {
  std::vector<SweepPoint> points;
  for (const char* name : names)
    for (int i = 1; i <= budgets; ++i) {
      const PolicyEntry& entry = find_policy(name);
      ReplaySettings settings;
      settings.budget = (tokens - decode) * i / 20;
      settings.block = entry.published.block, settings.compress = entry.published.compress;
      settings.positions = entry.published.positions;
      settings.measured = parse_measure("decode", tokens, tokens - decode);
      points.push_back({&entry, entry.make(), std::move(settings)});
    }
  return points;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

BenchRow time_sweep() {
  Synthetic shape;
  shape.layers = layers, shape.tokens = tokens, shape.prompt_tokens = tokens - decode;
  const std::vector<SweepPoint> points = sweep_points();
  std::vector<DevicePoint> given;
  for (const SweepPoint& point : points) given.push_back({point.entry, point.policy.get(), &point.settings});

  Synthetic first_layer = shape;
  first_layer.layers = 1;
  const BenchTrace small(first_layer), whole(shape, distinct_layers);
  Session small_session(small.file());
  const SweepPoint& sample = points[checked];
  const ReplayResult expected = replay(small_session, *sample.entry, *sample.policy, sample.settings);

  ReplayResult got;
  std::exception_ptr error;
  const auto start = std::chrono::steady_clock::now();
  Session session(whole.file());
  const double opened = seconds_since(start);
  const double busy = replay_on_device(session, given, {}, [&](std::size_t i, DeviceOutcome outcome) {
    if (outcome.error) error = outcome.error;
    if (i == checked) got = std::move(outcome.result);
    return !error;
  });
  const double seconds = seconds_since(start);
  if (error) std::rethrow_exception(error);
  got.final_position.resize(static_cast<std::size_t>(got.kv_heads));  // of the first layer
  check_against(expected, got, sweep_work);
  return row_of(sweep_work, "one second", {seconds * 1e6}, 1e6, 60, 10,
                fmt::format("{} decode tokens; the trace took {:.1f} s to open and check; GPU busy {:.0f} %", decode,
                            opened, 100 * busy / seconds));
}

}  // namespace kv
