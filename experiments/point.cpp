#include "experiments/point.hpp"

#include <fmt/core.h>

#include <nlohmann/json.hpp>
#include <span>

#include "core/error.hpp"
#include "core/sha256.hpp"
#include "kernels/engine.hpp"

namespace kv {
namespace {

constexpr std::string_view param_prefix = "policy.";

/// Sets `field` from a scalar of the config; messages carry the key as the user writes it and its place.
void set_from(Field field, const std::string& key, const Setting& setting) {
  field.name = key;
  try {
    field.set(parse_value(field, setting.text));
  } catch (const ConfigError& error) {
    fail(setting.place, error.what());
  }
}

/// Calls `body`; a ConfigError from it gets the place of `key`.
template <class F>
auto at_place(const Place& place, const std::string& prefix, F body) {
  try {
    return body();
  } catch (const ConfigError& error) {
    fail(place, prefix + error.what());
  }
}

/// "; did you mean 'window'?" for policy.windw among keys of the form policy.NAME.
std::string hint(const std::string& key, std::vector<std::string> known) {
  for (std::string& name : known) name.erase(0, param_prefix.size());
  return did_you_mean(key.substr(param_prefix.size()), known);
}

/// Asked once a process: the answer stays the same, and a driver takes its time.
bool has_device() {
  static const bool has = !devices().empty();
  return has;
}

/// The engine that the point runs on.
std::string backend_of(const Point& point) {
  if (point.keys.backend == AskedBackend::cpu) return "cpu";
  if (has_device()) return "cuda";
  if (point.keys.backend == AskedBackend::cuda)
    throw CudaError(fmt::format("{}: backend: no CUDA device: {}; use backend: cpu or auto",
                                to_text(point.place_of("backend")), why_no_device()));
  return "cpu";
}

/// Types points one by one and remembers which inherited parameters found no policy that has them.
class Resolver {
 public:
  Point resolve(const RawPoint& raw) {
    Point point;
    point.place = raw.place;
    for (const auto& [key, setting] : raw.settings) point.places[key] = setting.place;
    read_keys(raw, point);
    bind_policy(raw, point);
    resolve_auto(point);
    return point;
  }

  /// Throws when a parameter that was set above or below its policy's name was of use to no point.
  void check_inherited() const {
    for (const auto& [place_and_key, use] : inherited_)
      if (!use.used && !use.excused)
        fail(place_and_key.first, fmt::format("{}: no policy of this sweep has this parameter{}", place_and_key.second,
                                              hint(place_and_key.second, use.known)));
  }

 private:
  struct Use {
    bool used = false, excused = false;
    std::vector<std::string> known;  // parameters of the policies that were tried
  };

  void read_keys(const RawPoint& raw, Point& point) {
    for (Field& field : fields_of(point.keys)) {
      const auto at = raw.settings.find(field.name);
      if (at != raw.settings.end()) set_from(field, field.name, at->second);
    }
    for (const char* needed : {"trace", "policy"})
      if (!raw.settings.contains(needed)) fail(point.place, fmt::format("{}: missing", needed));
    at_place(point.place_of("replay.block"), "", [&] {
      if (point.keys.block != "auto") point.block = parse_block(point.keys.block);
    });
    point.backend = backend_of(point);
    if (point.keys.precision == Precision::fast && point.backend == "cpu")
      fail(point.place_of("replay.precision"),
           "replay.precision: fast is for cuda, and this point runs on cpu; use exact");
  }

  void bind_policy(const RawPoint& raw, Point& point) {
    at_place(point.place_of("policy"), "", [&] { point.entry = &find_policy(point.keys.policy); });
    point.policy = point.entry->make();
    std::vector<Field> fields = point.policy->fields();
    std::vector<std::string> known;
    for (const Field& field : fields) known.push_back(std::string(param_prefix) + field.name);
    for (const auto& [key, setting] : raw.settings) {
      if (!key.starts_with(param_prefix)) continue;
      const auto at = std::ranges::find(known, key);
      if (!accept(key, setting, raw.settings.at("policy").level, at != known.end(), known, point)) continue;
      set_from(fields[static_cast<std::size_t>(at - known.begin())], key, setting);
    }
    for (std::size_t i = 0; i < fields.size(); ++i) point.params.emplace_back(known[i], fields[i].get());
  }

  /// Whether the point takes the parameter. One set beside the policy's name must be the policy's; one inherited from
  /// the base, or given on the command line for all, goes to the policies that have it.
  bool accept(const std::string& key, const Setting& setting, Level named, bool has, std::vector<std::string> known,
              const Point& point) {
    if (setting.level == named) {
      if (!has)
        fail(setting.place,
             fmt::format("{}: policy {} has no such parameter{}", key, point.keys.policy, hint(key, known)));
      return true;
    }
    Use& use = inherited_[{setting.place, key}];
    use.used |= has;
    use.excused |= named == Level::command_line && someone_has(key);  // the policy it was meant for was replaced
    if (!has) std::ranges::move(known, std::back_inserter(use.known));
    return has;
  }

  static bool someone_has(const std::string& key) {
    for (const PolicyEntry& entry : policies())
      for (const Field& field : entry.make()->fields())
        if (param_prefix.size() + field.name.size() == key.size() && key.ends_with(field.name)) return true;
    return false;
  }

  static void resolve_auto(Point& point) {
    const Published& published = point.entry->published;
    if (point.keys.block == "auto") point.block = published.block;
    const AskedCompress compress = point.keys.compress;
    point.compress = compress == AskedCompress::automatic ? published.compress
                     : compress == AskedCompress::prompt  ? Compress::prompt
                                                          : Compress::always;
    const AskedPositions positions = point.keys.positions;
    point.positions = positions == AskedPositions::automatic  ? published.positions
                      : positions == AskedPositions::absolute ? Positions::absolute
                      : positions == AskedPositions::cache    ? Positions::cache
                                                              : Positions::span;
    const Traits traits = point.policy->traits();
    if (point.keys.budget == "none") point.keys.budget.clear();
    if (traits.compresses && !traits.needs_budget() && !point.keys.budget.empty())
      fail(
          point.place_of("budget"),
          fmt::format("budget: policy {} decides by a threshold how much stays; say 'budget: none', or let it be exact",
                      point.keys.policy));
    const bool compresses = traits.needs_budget();
    if (compresses && point.keys.budget.empty())
      fail(point.place_of("policy"),
           fmt::format("budget: missing; policy {} needs one, such as 'budget: 25%'", point.keys.policy));
    if (!point.keys.budget.empty())
      point.budget = at_place(point.place_of("budget"), "", [&] { return parse_budget(point.keys.budget); });
    if (!compresses) point.budget = {};  // everything, whatever was asked: its points at several budgets are one
  }

  std::map<std::pair<Place, std::string>, Use> inherited_;
};

/// The place of the key that a message "key: ..." is about, else of the policy.
const Place& place_of_message(const Point& point, const std::string& message) {
  const std::string key = message.substr(0, message.find(':'));
  return point.place_of(point.places.contains(key) ? key : "policy");
}

/// Whether a key's value tells this point from others: what only adds output does not, nor what came later and is
/// unused.
bool changes_the_run(const Point& point, const std::string& key) {
  const Allocation::Kind kind = point.keys.allocation.kind;
  if (key == "series" || key == "timing.repeats") return false;
  if (key == "replay.precision") return point.keys.precision != Precision::exact;
  if (key == "metrics") return point.keys.metrics != AskedMetrics::standard;
  if (key == "allocation.kind") return kind != Allocation::Kind::uniform;
  if (key == "allocation.beta") return kind == Allocation::Kind::pyramid;
  if (key == "allocation.floor") return kind == Allocation::Kind::adaptive;
  return true;
}

}  // namespace

const Place& Point::place_of(const std::string& key) const {
  const auto at = places.find(key);
  return at == places.end() ? place : at->second;
}

std::vector<std::pair<std::string, Value>> Point::values() const {
  std::vector<std::pair<std::string, Value>> all{{"trace", keys.trace}, {"policy", keys.policy}};
  all.insert(all.end(), params.begin(), params.end());
  all.emplace_back("replay.block", block.tokens == 0 ? Value("all") : Value(std::int64_t{block.tokens}));
  all.emplace_back("replay.compress", name_of(compress));
  all.emplace_back("replay.positions", name_of(positions));
  all.emplace_back("replay.precision", name_of(keys.precision));
  all.emplace_back("replay.measure", keys.measure);
  all.emplace_back("protect.sinks", std::int64_t{keys.protect.sinks});
  all.emplace_back("protect.recent", std::int64_t{keys.protect.recent});
  all.emplace_back("allocation.kind", name_of(keys.allocation.kind));
  all.emplace_back("allocation.beta", keys.allocation.beta);
  all.emplace_back("allocation.floor", keys.allocation.floor);
  all.emplace_back("metrics", keys.metrics == AskedMetrics::mass ? "mass" : "standard");
  const Traits traits = policy->traits();
  const std::string unasked = traits.compresses && !traits.needs_budget() ? "none" : budget.text;
  all.emplace_back("budget", keys.budget.empty() ? unasked : keys.budget);
  all.emplace_back("seed", std::int64_t{keys.seed});
  all.emplace_back("backend", backend);
  all.emplace_back("series", keys.series);
  all.emplace_back("timing.repeats", std::int64_t{keys.timing_repeats});
  return all;
}

std::vector<Point> resolve(const std::vector<RawPoint>& raw) {
  Resolver resolver;
  std::vector<Point> points;
  for (const RawPoint& point : raw) points.push_back(resolver.resolve(point));
  resolver.check_inherited();
  return points;
}

void attach(Point& point, const TraceHeader& header, const std::string& trace_identity) {
  point.run = run_id(canonical(point, trace_identity));
  ReplaySettings& settings = point.settings;
  settings.block = point.block;
  settings.compress = point.compress;
  settings.positions = point.positions;
  settings.precision = point.keys.precision;
  settings.protect = point.keys.protect;
  settings.allocation = point.keys.allocation;
  settings.mass = point.keys.metrics == AskedMetrics::mass;
  settings.seed = static_cast<std::uint64_t>(point.keys.seed);
  settings.timing_repeats = point.keys.timing_repeats;
  try {
    settings.measured =
        recorded_queries(header, parse_measure(point.keys.measure, header.tokens, header.prompt_tokens));
    if (settings.measured.empty())
      throw ConfigError(
          fmt::format("replay.measure: no query of '{}' is in every layer's q_index", point.keys.measure));
    settings.budget =
        point.policy->traits().needs_budget()
            ? slots_of(point.budget, header, slot_bytes(header, *point.entry, point.policy->traits(), point.positions))
            : header.tokens;
    check_point(header, *point.entry, *point.policy, settings);
  } catch (const ConfigError& error) {
    if (point.keys.on_invalid == OnInvalid::error) fail(place_of_message(point, error.what()), error.what());
    point.invalid = error.what();
  }
}

std::string canonical(const Point& point, const std::string& trace_identity) {
  nlohmann::json text;  // keys sorted, values typed
  for (const auto& [key, value] : point.values())
    if (changes_the_run(point, key)) text[key] = to_json(value);
  text["budget"] = point.budget.text;
  text["trace"] = trace_identity;
  return text.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string run_id(const std::string& canonical) {
  Sha256 hash;
  hash.update(std::as_bytes(std::span(canonical)));
  return hash.hex().substr(0, 16);
}

nlohmann::json to_json(const Value& value) {
  return std::visit([](const auto& x) { return nlohmann::json(x); }, value);
}

}  // namespace kv
