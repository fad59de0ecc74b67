// Everything that is settled before the first run: the points that will run, each checked against its open trace.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/session.hpp"
#include "experiments/config.hpp"
#include "experiments/point.hpp"

namespace kv {

struct Plan {
  std::vector<Point> points;                                 // distinct; all of one trace together
  std::map<std::string, std::unique_ptr<Session>> sessions;  // by trace as written
  std::map<std::string, std::string> identities;             // trace_identity, by trace as written
  std::size_t duplicates = 0;        // points that were left out because another is the same run
  std::vector<std::string> varying;  // keys by which points differ; parameters within one policy
  std::map<std::string, std::vector<std::string>> own_varying;  // the same among the points of one policy

  const TraceHeader& header(const Point& point) const { return sessions.at(point.keys.trace)->header(); }
};

/// Expands, types and checks the config's points and keeps those that `only` ("key=value", the same key twice means
/// either value) lets through. Throws ConfigError, TraceError, CudaError; nothing is written.
Plan make_plan(const Config& config, const std::vector<std::string>& only);

/// "h2o budget=25% compress=always wikitext2": what a point is called in progress lines.
std::string label(const Plan& plan, const Point& point);

/// A trace's file name without what is the same for all traces of the plan.
std::string trace_label(const Plan& plan, const std::string& trace);

/// The text of one of the point's values; "" when it has no such key.
std::string value_text(const Point& point, const std::string& key);

/// A key without its group: "replay.compress" -> "compress".
std::string short_key(const std::string& key);

}  // namespace kv
