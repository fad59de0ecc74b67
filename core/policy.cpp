#include "core/policy.hpp"

#include <algorithm>

#include "core/error.hpp"

namespace kv {
namespace {

std::vector<PolicyEntry>& catalogue() {
  static std::vector<PolicyEntry> entries;  // built on first use: registrars run before main in any order
  return entries;
}

}  // namespace

const std::vector<PolicyEntry>& policies() {
  const auto& entries = catalogue();
  const auto twice = std::adjacent_find(entries.begin(), entries.end(), [](const PolicyEntry& a, const PolicyEntry& b) {
    return std::string_view(a.doc.name) == b.doc.name;
  });
  if (twice != entries.end())
    throw ConfigError("policy: '" + std::string(twice->doc.name) + "' is registered twice, by " + twice->file +
                      " and " + std::next(twice)->file);
  return entries;
}

const PolicyEntry& find_policy(const std::string& name) {
  std::vector<std::string> names;
  for (const PolicyEntry& entry : policies()) {
    if (entry.doc.name == name) return entry;
    names.emplace_back(entry.doc.name);
  }
  throw ConfigError("policy: no policy is called '" + name + "'" + did_you_mean(name, names));
}

bool register_policy(PolicyEntry entry) {
  auto& entries = catalogue();
  const auto place = std::lower_bound(
      entries.begin(), entries.end(), entry,
      [](const PolicyEntry& a, const PolicyEntry& b) { return std::string_view(a.doc.name) < b.doc.name; });
  entries.insert(place, std::move(entry));
  return true;
}

}  // namespace kv
