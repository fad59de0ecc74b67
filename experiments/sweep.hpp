// From a config's tree to the points of its sweep, still as text: blocks, axes, zip, base and overrides (design section
// 9; `kvreplay docs configs` says the rules in words).
#pragma once
#include <map>
#include <string>
#include <vector>

#include "experiments/config.hpp"

namespace kv {

/// Who set a key: the nearer to the end of this list, the stronger.
enum class Level { base, block, command_line };

/// One scalar of a config.
struct Setting {
  std::string text;
  Place place;
  Level level = Level::base;
};

/// One point of a sweep: dotted keys with their scalars.
struct RawPoint {
  std::map<std::string, Setting> settings;
  Place place;  // of its block
};

/// All points in the order written: blocks one after another, in each the first axis outermost. Throws ConfigError.
std::vector<RawPoint> expand(const Config& config);

}  // namespace kv
