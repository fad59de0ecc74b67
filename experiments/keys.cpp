#include "experiments/keys.hpp"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>

#include "core/error.hpp"

namespace kv {

std::vector<std::string> key_names() {
  Keys keys;
  std::vector<std::string> names;
  for (const Field& field : fields_of(keys)) names.push_back(field.name);
  return names;
}

void check_key(const std::string& key) {
  check_group(key);
  std::vector<std::string> members;
  for (const std::string& name : key_names()) {
    if (name == key) return;
    if (name.starts_with(key + ".")) members.push_back(name.substr(key.size() + 1));
  }
  if (!members.empty()) throw ConfigError(fmt::format("{}: expected a map with {}", key, fmt::join(members, ", ")));
}

void check_group(const std::string& key) {
  if (key.starts_with("policy.") && key != "policy.") return;
  std::vector<std::string> names = key_names();
  for (const std::string& name : names)
    if (name == key || name.starts_with(key + ".")) return;
  for (const StructureKey& structure : structure_keys) names.push_back(structure.name);
  throw ConfigError(fmt::format("{}: unknown key{}", key, did_you_mean(key, names)));
}

}  // namespace kv
