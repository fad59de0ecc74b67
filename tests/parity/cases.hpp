// Points of one trace on both engines: the GPU takes them in one call.
#pragma once
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <typeinfo>
#include <vector>

#include "core/error.hpp"
#include "kernels/engine.hpp"
#include "tests/parity/agreement.hpp"
#include "tests/parity/nudged.hpp"
#include "tests/parity/variants.hpp"

namespace kv::test {

/// Whether the device is kernels/emulator: it takes the small ones of many cases.
inline bool emulated() { return devices().front().name == "emulator"; }

struct Case {
  std::string name;
  const PolicyEntry* entry = nullptr;
  std::shared_ptr<BoundPolicy> policy;
  ReplaySettings settings;
};

/// Stays away from points that rounding alone decides: two keys are equally far from their mean (KeyDiff); when two slots
/// are all that may join their weights are 0/0 (KVSlimmer); and a merge at every token, or into very few slots, amplifies
/// any last bit (AsymKV).
inline void settle(const std::string& policy, ReplaySettings& settings, Parameters& parameters) {
  const bool even = settings.allocation.kind == Allocation::Kind::uniform, slimmer = policy.starts_with("kv_slimmer");
  if (policy == "keydiff" || slimmer) settings.budget = std::max(settings.budget, even ? 3 : 40);
  if (policy == "asym_kv") settings.budget = std::max(settings.budget, 40);
  if (policy == "asym_kv" && settings.block == Block{1}) settings.block = {16};
  if (slimmer && (settings.budget < 40 || !even)) parameters.emplace_back("sinks", std::int64_t{0});
}

/// `settings` with `budget` spelt as in a config.
inline Case make_case(const TraceHeader& trace, const PolicyEntry& entry, Parameters parameters,
                      const std::string& budget, ReplaySettings settings, const std::string& name) {
  const Traits traits = make_policy(entry, parameters)->traits();
  settings.budget = traits.needs_budget()
                        ? slots_of(parse_budget(budget), trace, slot_bytes(trace, entry, traits, settings.positions))
                        : trace.tokens;
  settle(entry.doc.name, settings, parameters);
  Case c{fmt::format("{}: {}{}, {}, budget {}", entry.doc.name, name.empty() ? "" : name + ", ",
                     kv::name_of(settings.compress), kv::name_of(settings.positions), settings.budget),
         &entry, make_policy(entry, parameters), settings};
  for (const auto& [key, value] : parameters) c.name += fmt::format(", {}={}", key, to_text(value));
  return c;
}

inline bool possible(const TraceHeader& trace, const Case& c) {
  try {
    check_point(trace, *c.entry, *c.policy, c.settings);
    return true;
  } catch (const ConfigError&) {
    return false;
  }
}

/// What became of each case in one call.
inline std::vector<DeviceOutcome> replay_together(Session& session, const std::vector<Case>& cases,
                                                  const DeviceOptions& options = {}) {
  std::vector<DevicePoint> points;
  for (const Case& c : cases) points.push_back({c.entry, c.policy.get(), &c.settings});
  std::vector<DeviceOutcome> outcomes(cases.size());
  std::vector<int> calls(cases.size(), 0);
  replay_on_device(session, points, options, [&](std::size_t i, DeviceOutcome outcome) {
    ++calls.at(i);
    outcomes[i] = std::move(outcome);
    return true;
  });
  EXPECT_EQ(calls, std::vector<int>(cases.size(), 1)) << "every point is reported once";
  return outcomes;
}

inline ReplayResult replay(Session& session, const Case& c) { return replay(session, *c.entry, *c.policy, c.settings); }

inline DeviceOutcome replay_on_cpu(Session& session, const Case& c) {
  DeviceOutcome outcome;
  try {
    outcome.result = replay(session, c);
  } catch (const std::exception&) {
    outcome.error = std::current_exception();
  }
  return outcome;
}

/// The error's type and text; "" without one.
inline std::string error_of(const DeviceOutcome& outcome) {
  if (!outcome.error) return "";
  try {
    std::rethrow_exception(outcome.error);
  } catch (const std::exception& error) {
    return fmt::format("{}: {}", typeid(error).name(), error.what());
  } catch (...) {
    return "no std::exception";
  }
}

/// The type alone: which head of several fails first is chance.
inline std::string kind_of(const std::string& error) { return error.substr(0, error.find(':')); }

using Agreements = std::map<std::string, Agreement>;  // by policy

/// Replays the cases that are possible on both engines and adds to `out` how they compare.
inline void compare_engines(Session& session, const std::vector<Case>& cases, Agreements& out) {
  std::vector<Case> runs;
  for (const Case& c : cases) {
    if (possible(session.header(), c))
      runs.push_back(c);
    else
      ++out[c.entry->doc.name].impossible;
  }
  const std::vector<DeviceOutcome> device = replay_together(session, runs);
  NudgedTraces nudged(session.header());
  for (std::size_t i = 0; i < runs.size(); ++i) {
    Agreement& agreement = out[runs[i].entry->doc.name];
    const DeviceOutcome cpu = replay_on_cpu(session, runs[i]);
    const std::string ours = error_of(cpu), theirs = error_of(device[i]);
    if (kind_of(ours) != kind_of(theirs))
      agreement.faults.push_back(fmt::format("{}: errors '{}', '{}'", runs[i].name, ours, theirs));
    else if (ours.empty())
      PointComparison(
          runs[i].name, cpu.result, device[i].result,
          [&] { return nudged.each(runs[i].policy->traits(), [&](Session& copy) { return replay(copy, runs[i]); }); },
          agreement)
          .run();
  }
}

inline std::string first_of(const std::vector<std::string>& lines) {
  std::string text;
  for (std::size_t i = 0; i < std::min<std::size_t>(lines.size(), 12); ++i) text += "\n  " + lines[i];
  return text;
}

/// At most 2 % of all heads, or as many as one near tie can change, may differ; and rounding may decide a fifth.
inline void expect_agreement(const Agreement& a, std::size_t one_tie) {
  EXPECT_TRUE(a.faults.empty()) << a.faults.size() << " faults (CPU, GPU):" << first_of(a.faults);
  EXPECT_LE(a.undecided, std::max(one_tie, a.heads / 5)) << "of " << a.heads << " heads are decided by rounding";
  EXPECT_LE(a.differing.size(), std::max(one_tie, a.heads / 50))
      << "of " << a.heads << " heads (CPU, GPU):" << first_of(a.differing);
}

}  // namespace kv::test
