#include "experiments/plan.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <set>

#include "core/error.hpp"
#include "experiments/trace_identity.hpp"

namespace kv {
namespace {

namespace fs = std::filesystem;

const Place command_line{"command line", 0};

/// The values a point can be told apart by, its run id included.
std::vector<std::pair<std::string, Value>> filterable(const Point& point) {
  auto values = point.values();
  values.emplace_back("run", point.run);
  return values;
}

/// Throws when there is nothing at the path; what is there but no file is for the trace reader to refuse.
void check_file(const Point& point) {
  const fs::path path = point.keys.trace;
  std::error_code ignored;
  if (fs::exists(path, ignored)) return;
  std::vector<std::string> names;
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  for (const auto& entry : fs::directory_iterator(folder, ignored)) names.push_back(entry.path().filename().string());
  std::ranges::sort(names);
  fail(point.place_of("trace"),
       fmt::format("trace: no such file: {}{}", path.string(), did_you_mean(path.filename().string(), names)));
}

void open_traces(Plan& plan) {
  for (const Point& point : plan.points) check_file(point);
  for (const Point& point : plan.points) {
    std::unique_ptr<Session>& session = plan.sessions[point.keys.trace];
    if (session) continue;
    session = std::make_unique<Session>(point.keys.trace);
    plan.identities[point.keys.trace] = trace_identity(session->header());
  }
}

/// Makes `point` ask for whatever `other`, the same run, asks for.
void merge(Point& point, const Point& other) {
  point.keys.series |= other.keys.series;
  point.keys.timing_repeats = std::max(point.keys.timing_repeats, other.keys.timing_repeats);
  point.settings.timing_repeats = point.keys.timing_repeats;
}

/// Points of one trace together, traces and points in the order written; points with the same run become the first.
void order_and_collapse(Plan& plan) {
  std::map<std::string, int> rank;
  for (const Point& point : plan.points) rank.emplace(point.keys.trace, static_cast<int>(rank.size()));
  std::ranges::stable_sort(plan.points, {}, [&](const Point& point) { return rank.at(point.keys.trace); });
  std::vector<Point> distinct;
  std::map<std::string, std::size_t> place;
  for (Point& point : plan.points) {
    const auto [at, fresh] = place.try_emplace(point.run, distinct.size());
    if (fresh)
      distinct.push_back(std::move(point));
    else
      merge(distinct[at->second], point);
  }
  plan.duplicates = plan.points.size() - distinct.size();
  plan.points = std::move(distinct);
}

/// One `--only` key with the values that may pass.
struct Filter {
  std::string key;
  std::vector<std::string> values;
};

std::vector<Filter> parse_only(const std::vector<std::string>& only) {
  std::vector<Filter> filters;
  for (const std::string& text : only) {
    const std::size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0)
      fail(command_line, fmt::format("--only: expected key=value, got '{}'", text));
    const std::string key = text.substr(0, equals);
    auto at = std::ranges::find(filters, key, &Filter::key);
    if (at == filters.end()) at = filters.insert(filters.end(), {key, {}});
    at->values.push_back(text.substr(equals + 1));
  }
  return filters;
}

/// Whether `text` is a spelling of `value`: 0.50 and 5e-1 are 0.5.
bool spells(const std::string& text, const Value& value) {
  if (text == to_text(value)) return true;
  double x = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), x);
  if (error != std::errc{} || stop != text.data() + text.size()) return false;
  if (const std::int64_t* i = std::get_if<std::int64_t>(&value)) return x == static_cast<double>(*i);
  const double* number = std::get_if<double>(&value);
  return number != nullptr && x == *number;
}

bool passes(const Filter& filter, const Point& point) {
  return std::ranges::any_of(filterable(point), [&](const auto& entry) {
    return entry.first == filter.key &&
           std::ranges::any_of(filter.values, [&](const std::string& text) { return spells(text, entry.second); });
  });
}

/// Throws when no point could pass `filter`, naming what is close.
void check_filter(const Filter& filter, const std::vector<Point>& points) {
  std::set<std::string> keys, values;
  for (const Point& point : points)
    for (const auto& [key, value] : filterable(point)) {
      keys.insert(key);
      if (key == filter.key) values.insert(to_text(value));
    }
  const auto list = [](const std::set<std::string>& set) { return std::vector<std::string>(set.begin(), set.end()); };
  if (!keys.contains(filter.key))
    fail(command_line,
         fmt::format("--only: no point has a key '{}'{}", filter.key, did_you_mean(filter.key, list(keys))));
  for (const std::string& value : filter.values)
    if (std::ranges::none_of(points, [&](const Point& point) { return passes({filter.key, {value}}, point); }))
      fail(command_line,
           fmt::format("--only: no point has {}={}{}", filter.key, value, did_you_mean(value, list(values))));
}

void apply_only(Plan& plan, const std::vector<std::string>& only) {
  const std::vector<Filter> filters = parse_only(only);
  for (const Filter& filter : filters) check_filter(filter, plan.points);
  std::erase_if(plan.points, [&](const Point& point) {
    return !std::ranges::all_of(filters, [&](const Filter& filter) { return passes(filter, point); });
  });
  if (plan.points.empty()) fail(command_line, "--only: no point passes all filters");
}

/// Finds the keys that take more than one value, in row order: over all points, and for each policy over its own.
void find_varying(Plan& plan) {
  std::vector<std::string> order;
  std::map<std::pair<std::string, std::string>, std::set<std::string>> texts;  // (key, policy), and (key, "") over all
  for (const Point& point : plan.points)
    for (const auto& [key, value] : point.values()) {
      texts[{key, point.keys.policy}].insert(to_text(value));
      if (!key.starts_with("policy.")) texts[{key, ""}].insert(to_text(value));
      if (std::ranges::find(order, key) == order.end()) order.push_back(key);
    }
  for (const std::string& key : order) {
    bool varies = texts[{key, ""}].size() > 1;
    for (const Point& point : plan.points) {
      std::vector<std::string>& own = plan.own_varying[point.keys.policy];
      if (texts[{key, point.keys.policy}].size() < 2 || std::ranges::find(own, key) != own.end()) continue;
      own.push_back(key);
      varies = true;
    }
    if (varies) plan.varying.push_back(key);
  }
}

}  // namespace

Plan make_plan(const Config& config, const std::vector<std::string>& only) {
  Plan plan;
  plan.points = resolve(expand(config));
  open_traces(plan);
  for (Point& point : plan.points) attach(point, plan.header(point), plan.identities.at(point.keys.trace));
  apply_only(plan, only);
  order_and_collapse(plan);
  find_varying(plan);
  return plan;
}

std::string short_key(const std::string& key) { return key.substr(key.find('.') + 1); }

std::string value_text(const Point& point, const std::string& key) {
  for (const auto& [name, value] : point.values())
    if (name == key) return to_text(value);
  return "";
}

std::string trace_label(const Plan& plan, const std::string& trace) {
  const auto stem = [](const std::string& path) { return fs::path(path).stem().string(); };
  const std::string mine = stem(trace);
  std::size_t common = mine.size();
  for (const auto& [other, session] : plan.sessions) {
    const std::string theirs = stem(other);
    if (other != trace)
      common = std::min(common, static_cast<std::size_t>(std::ranges::mismatch(mine, theirs).in1 - mine.begin()));
  }
  if (plan.sessions.size() < 2) return mine;
  const std::size_t word = mine.find_last_of("-_. ", common == 0 ? 0 : common - 1);  // cut between words only
  return word == std::string::npos || word + 1 >= mine.size() ? mine : mine.substr(word + 1);
}

std::string label(const Plan& plan, const Point& point) {
  std::string text = fmt::format("{} budget={}", point.keys.policy, point.budget.text);
  for (const std::string& key : plan.own_varying.at(point.keys.policy))
    if (key != "trace" && key != "budget") text += fmt::format(" {}={}", short_key(key), value_text(point, key));
  return fmt::format("{} {}", text, trace_label(plan, point.keys.trace));
}

}  // namespace kv
