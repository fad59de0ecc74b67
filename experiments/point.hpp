// One point of a sweep with every setting typed and resolved: what runs, what names it, and what its row says of it.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "core/budget.hpp"
#include "core/policy.hpp"
#include "core/replay.hpp"
#include "experiments/keys.hpp"
#include "experiments/sweep.hpp"

namespace kv {

struct Point {
  Keys keys;  // as written; `auto` is still there
  const PolicyEntry* entry = nullptr;
  std::shared_ptr<BoundPolicy> policy;                // with its parameters
  std::vector<std::pair<std::string, Value>> params;  // "policy.recent", ...: all of the policy's, resolved
  Budget budget;  // everything when the policy does not compress, whatever was written
  Block block;
  Compress compress = Compress::always;
  Positions positions = Positions::absolute;
  std::string backend;                  // resolved: cpu or cuda
  std::map<std::string, Place> places;  // of the keys that were written
  Place place;                          // of its block

  /// Set by attach().
  ReplaySettings settings;
  std::string run;      // identity
  std::string invalid;  // why the trace cannot serve it; "" = it can

  /// Where `key` was written, else the block.
  const Place& place_of(const std::string& key) const;

  /// Every key that a row repeats with its resolved value, in row order. Those that do not change what is computed
  /// (series, timing.repeats) come last.
  std::vector<std::pair<std::string, Value>> values() const;
};

/// Typed points: names, parameters and budgets checked, `auto` resolved; traces are not opened yet. Throws ConfigError
/// with file and line, CudaError with the same when a point asks for a GPU and there is none.
std::vector<Point> resolve(const std::vector<RawPoint>& raw);

/// Fills in what depends on the trace: slots, measured tokens, run id; checks that the trace can serve the point. A
/// point it cannot serve gets `invalid`, or is a ConfigError, as its `on_invalid` says. `trace_identity` is its
/// trace's.
void attach(Point& point, const TraceHeader& header, const std::string& trace_identity);

/// The text whose hash is the run id: what is computed, on which trace.
std::string canonical(const Point& point, const std::string& trace_identity);

/// First 16 hex digits of the SHA-256 of `canonical`.
std::string run_id(const std::string& canonical);

nlohmann::json to_json(const Value& value);

}  // namespace kv
