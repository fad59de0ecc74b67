#include "core/policy.hpp"

#include <algorithm>

#include "core/error.hpp"

namespace kv {
namespace {

std::vector<PolicyEntry>& catalogue() {
  static std::vector<PolicyEntry> entries;  // built on first use: registrars run before main in any order
  return entries;
}

/// A name as YAML keys and file names can carry it.
bool is_plain(const std::string& name) {
  return !name.empty() && name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos;
}

/// What is wrong with a policy's parameters, or "".
std::string parameter_fault(const PolicyEntry& entry) {
  const auto policy = entry.make();
  std::vector<std::string> names;
  for (const Field& field : policy->fields()) {
    if (!is_plain(field.name)) return "parameter '" + field.name + "' must be named in lower case, digits and _";
    if (std::count(names.begin(), names.end(), field.name)) return "parameter '" + field.name + "' is described twice";
    names.push_back(field.name);
    try {
      parse_value(field, to_text(field.get()));
    } catch (const std::exception& error) {
      return std::string("the default of ") + error.what();
    }
  }
  return "";
}

void check_catalogue() {
  const auto& entries = catalogue();
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::string name = entries[i].doc.name;
    if (!is_plain(name))
      throw ConfigError(entries[i].file + ": policy '" + name + "' must be named in lower case, digits and _");
    if (i > 0 && name == entries[i - 1].doc.name)
      throw ConfigError("policy '" + name + "' is registered twice, by " + entries[i - 1].file + " and " +
                        entries[i].file);
    const std::string fault = parameter_fault(entries[i]);
    if (!fault.empty()) throw ConfigError(entries[i].file + ": policy '" + name + "': " + fault);
  }
}

}  // namespace

const std::vector<PolicyEntry>& policies() {
  static const bool checked = (check_catalogue(), true);
  (void)checked;
  return catalogue();
}

void hook_lacks(const char* what) {
  throw InternalError(std::string("a policy's hook reads what it did not ask for: ") + what);
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
