// What a replay costs on the CPU: every policy of the catalogue over a real trace, per decode step, all layers and
// heads. `make bench` runs it. Each result is checked before it is timed: a replay must repeat to the bit, and full
// attention must agree with what the model recorded.
#include <benchmark/benchmark.h>
#include <fmt/core.h>

#include <cstdlib>

#include "core/metrics.hpp"

namespace kv {
namespace {

Session& session() {
  static Session s(KV_TEST_DATA "/smollm2-135m-wikitext2.h5");
  return s;
}

ReplaySettings settings_of(const PolicyEntry& entry, int budget) {
  ReplaySettings s;
  s.budget = budget, s.block = entry.published.block, s.positions = entry.published.positions;
  s.measured = parse_measure("decode", session().header().tokens, session().header().prompt_tokens);
  return s;
}

void check(bool good, const std::string& what) {
  if (good) return;
  fmt::print(stderr, "bench: {}: nothing is timed\n", what);
  std::exit(1);
}

void check_trace() {
  const auto measured = parse_measure("all", session().header().tokens, session().header().prompt_tokens);
  for (const auto& layer : metrics_of(noise_floor(session(), measured)).rel_l2.layer)
    check(layer.value() <= 2.5e-3, "full attention differs from the model's");
}

void replay_decode(benchmark::State& state, const PolicyEntry& entry, int budget) {
  const auto policy = entry.make();
  ReplaySettings settings = settings_of(entry, budget);
  const ReplayResult first = replay(session(), entry, *policy, settings);
  check(replay(session(), entry, *policy, settings).error2 == first.error2,
        fmt::format("{} does not repeat", entry.doc.name));
  settings.timing_repeats = 1;
  double total = 0, policy_time = 0, attend = 0;
  for (auto _ : state) {
    const ReplayResult timed = replay(session(), entry, *policy, settings);
    double step = 0;
    for (int phase = 0; phase < timed_phases; ++phase) {
      const double us = percentile(timed.us[static_cast<std::size_t>(phase)], 50).value();
      step += us;
      if (static_cast<TimedPhase>(phase) >= TimedPhase::observe) policy_time += us;
      if (static_cast<TimedPhase>(phase) == TimedPhase::attend) attend += us;
    }
    state.SetIterationTime(step * 1e-6);
    total += step;
  }
  state.counters["policy/attend"] = policy_time / attend;
  state.counters["nmse"] = metrics_of(first).nmse.value();
  benchmark::DoNotOptimize(total);
}

}  // namespace
}  // namespace kv

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  kv::check_trace();
  for (const kv::PolicyEntry& entry : kv::policies())
    for (const int budget : {64, 256})
      benchmark::RegisterBenchmark(
          fmt::format("decode_step/{}/{}", entry.doc.name, budget).c_str(),
          [&entry, budget](benchmark::State& state) { kv::replay_decode(state, entry, budget); })
          ->UseManualTime()
          ->Iterations(3)
          ->Unit(benchmark::kMicrosecond);
  benchmark::RunSpecifiedBenchmarks();
}
