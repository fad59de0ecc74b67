#include "experiments/sweep.hpp"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "core/error.hpp"
#include "experiments/keys.hpp"

namespace kv {
namespace {

constexpr std::size_t max_points = 100'000;

/// What one choice of an axis sets: one key, or the keys of a map.
using Assignment = std::vector<std::pair<std::string, Setting>>;

/// A key and what it may be. A scalar is an axis with one choice.
struct Axis {
  std::string key;
  Place place;
  bool zipped = false;
  std::vector<Assignment> choices;
};

/// `policy: {name: h2o}` and `policy: h2o` are the same.
std::string full_key(const std::string& key) { return key == "policy.name" ? "policy" : key; }

/// Runs check_key or check_group and adds the place to what it throws.
void check_at(const Place& place, void (*check)(const std::string&), const std::string& key) {
  try {
    check(key);
  } catch (const ConfigError& error) {
    fail(place, error.what());
  }
}

std::vector<Assignment> product(const std::vector<Axis>& axes, const Place& place) {
  std::vector<Assignment> all(1);
  for (const Axis& axis : axes) {
    if (all.size() * axis.choices.size() > max_points)
      fail(place, fmt::format("this sweep has more than {} points", max_points));
    std::vector<Assignment> longer;
    for (const Assignment& head : all)
      for (const Assignment& tail : axis.choices) {
        longer.push_back(head);
        longer.back().insert(longer.back().end(), tail.begin(), tail.end());
      }
    all = std::move(longer);
  }
  return all;
}

/// Refuses a key that two axes of one map set.
void check_given_once(const std::vector<Axis>& axes) {
  std::map<std::string, std::pair<const Axis*, Place>> owner;
  for (const Axis& axis : axes)
    for (const Assignment& choice : axis.choices)
      for (const auto& [key, setting] : choice) {
        const auto [at, fresh] = owner.try_emplace(key, &axis, setting.place);
        if (!fresh && at->second.first != &axis)
          fail(setting.place, fmt::format("{}: given twice, also at {}", key, to_text(at->second.second)));
      }
}

/// Appends the axes that `value` under `key` stands for: a map spreads into its members, a list is an axis, a scalar an
/// axis with one choice.
void read_key(const std::string& key, const Place& place, const Node& value, Level level, bool zipped,
              std::vector<Axis>& axes);

std::vector<Axis> read_members(const std::string& prefix, const Node& map, Level level, bool zipped) {
  std::vector<Axis> axes;
  for (const Member& member : map.members)
    read_key(full_key(prefix + member.key), member.place, member.value, level, zipped, axes);
  return axes;
}

/// The choices of a list: its scalars, and its maps with any axes inside them multiplied out.
std::vector<Assignment> read_choices(const std::string& key, const Place& place, const Node& list, Level level) {
  if (list.items.empty()) fail(place, fmt::format("{}: the list is empty", key));
  std::vector<Assignment> choices;
  for (const Node& item : list.items) {
    if (item.kind == Node::Kind::list) fail(item.place, fmt::format("{}: a list inside a list", key));
    if (item.kind == Node::Kind::scalar) {
      check_at(item.place, check_key, key);
      choices.push_back({{key, {item.text, item.place, level}}});
    } else {
      const std::vector<Axis> axes = read_members(key + ".", item, level, false);
      check_given_once(axes);
      std::ranges::move(product(axes, item.place), std::back_inserter(choices));
    }
  }
  return choices;
}

void read_key(const std::string& key, const Place& place, const Node& value, Level level, bool zipped,
              std::vector<Axis>& axes) {
  check_at(place, value.kind == Node::Kind::scalar ? check_key : check_group, key);
  if (value.kind == Node::Kind::map) {
    std::ranges::move(read_members(key + ".", value, level, zipped), std::back_inserter(axes));
  } else if (value.kind == Node::Kind::list) {
    axes.push_back({key, place, zipped, read_choices(key, place, value, level)});
  } else {
    axes.push_back({key, place, zipped, {{{key, {value.text, value.place, level}}}}});
  }
}

/// All axes of one map of a config: the base, a block or the command line.
std::vector<Axis> read_level(const Node& map, Level level, bool may_sweep) {
  std::vector<Axis> axes;
  for (const Member& member : map.members) {
    if (member.key == "sweep") {
      if (!may_sweep) fail(member.place, "sweep: only at the top of a config file");
    } else if (member.key == "zip" || member.key.starts_with("zip.")) {
      if (member.key == "zip" && member.value.kind != Node::Kind::map)
        fail(member.place, "zip: expected a map of lists such as {budget: [25%, 50%], policy.window: [16, 32]}");
      if (member.key == "zip")
        std::ranges::move(read_members("", member.value, level, true), std::back_inserter(axes));
      else
        read_key(full_key(member.key.substr(4)), member.place, member.value, level, true, axes);
    } else {
      read_key(full_key(member.key), member.place, member.value, level, false, axes);
    }
  }
  check_given_once(axes);
  return axes;
}

/// `upper` replaces what `lower` says of the same key, in its place.
void replace(std::vector<Axis>& lower, const std::vector<Axis>& upper) {
  for (const Axis& axis : upper) {
    const auto same = std::ranges::find(lower, axis.key, &Axis::key);
    if (same != lower.end())
      *same = axis;
    else
      lower.push_back(axis);
  }
}

/// The zipped axes as one axis, at the place of the first.
std::vector<Axis> join_zip(const std::vector<Axis>& axes) {
  std::vector<Axis> joined;
  Axis* zip = nullptr;
  joined.reserve(axes.size());  // `zip` points into it
  for (const Axis& axis : axes) {
    if (!axis.zipped || zip == nullptr) {
      joined.push_back(axis);
      if (axis.zipped) zip = &joined.back();
      continue;
    }
    if (axis.choices.size() != zip->choices.size())
      fail(axis.place, fmt::format("zip: lists of different length: {} has {}, {} has {}", zip->key,
                                   zip->choices.size(), axis.key, axis.choices.size()));
    for (std::size_t i = 0; i < axis.choices.size(); ++i)
      zip->choices[i].insert(zip->choices[i].end(), axis.choices[i].begin(), axis.choices[i].end());
  }
  return joined;
}

void append_points(const std::vector<Axis>& axes, const Place& place, std::vector<RawPoint>& points) {
  for (const Assignment& assignment : product(join_zip(axes), place)) {
    RawPoint point{{}, place};
    for (const auto& [key, setting] : assignment) {
      const auto [at, fresh] = point.settings.try_emplace(key, setting);
      if (!fresh && at->second.level < setting.level) at->second = setting;
    }
    points.push_back(std::move(point));
  }
  if (points.size() > max_points) fail(place, fmt::format("this sweep has more than {} points", max_points));
}

}  // namespace

std::vector<RawPoint> expand(const Config& config) {
  std::vector<RawPoint> points;
  const std::vector<Axis> overrides = read_level(config.overrides, Level::command_line, false);
  const auto sweep = std::ranges::find(config.root.members, std::string("sweep"), &Member::key);
  if (sweep == config.root.members.end()) {
    std::vector<Axis> axes = read_level(config.root, Level::block, true);
    replace(axes, overrides);
    append_points(axes, {config.file, 0}, points);
    return points;
  }
  const std::vector<Axis> base = read_level(config.root, Level::base, true);
  if (sweep->value.kind != Node::Kind::list || sweep->value.items.empty())
    fail(sweep->place, "sweep: expected a list of blocks such as '- policy: h2o'");
  for (const Node& block : sweep->value.items) {
    if (block.kind != Node::Kind::map) fail(block.place, "sweep: a block is a map of keys such as 'policy: h2o'");
    std::vector<Axis> axes = base;
    replace(axes, read_level(block, Level::block, false));
    replace(axes, overrides);
    append_points(axes, block.place, points);
  }
  return points;
}

}  // namespace kv
