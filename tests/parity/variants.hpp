// The policies of the catalogue, and what their parameters can make of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/policy.hpp"

namespace kv::test {

using Parameters = std::vector<std::pair<std::string, Value>>;  // that differ from the policy's defaults

inline std::vector<std::string> policy_names() {
  std::vector<std::string> all;
  for (const PolicyEntry& entry : policies()) all.emplace_back(entry.doc.name);
  return all;
}

inline std::shared_ptr<BoundPolicy> make_policy(const PolicyEntry& entry, const Parameters& parameters) {
  std::shared_ptr<BoundPolicy> policy = entry.make();
  for (const Field& field : policy->fields())
    for (const auto& [name, value] : parameters)
      if (field.name == name) field.set(value);
  return policy;
}

/// Every choice and switch of a policy's parameters, both ends of every share and cosine, and a small whole number, one
/// at a time; the defaults first.
inline std::vector<Parameters> variants(const PolicyEntry& entry) {
  std::vector<Parameters> all{{}};
  const auto policy = entry.make();
  for (const Field& field : policy->fields()) {
    for (const std::string& choice : field.choices) all.push_back({{field.name, choice}});
    if (field.type == "bool") all.push_back({{field.name, !std::get<bool>(field.get())}});
    if (field.type == "int" && field.low <= 3 && field.high >= 3) all.push_back({{field.name, std::int64_t{3}}});
    if (field.type != "number" || std::abs(field.low) > 2 || std::abs(field.high) > 2) continue;
    for (const double end : {field.low, field.high}) all.push_back({{field.name, end}});
  }
  return all;
}

}  // namespace kv::test
