// Tables and pages that are made from the code's own lists: the catalogue of policies, the metrics, the config keys.
#pragma once
#include <string>

#include "core/policy.hpp"

namespace kv {

/// README's table of policies.
std::string policies_markdown();

/// README's table of metrics.
std::string metrics_markdown();

/// configs/README.md, whole.
std::string configs_markdown();

/// `kvreplay policies`: name and summary, one a line.
std::string policies_text();

/// `kvreplay policies NAME`: parameters with type, default and help, published settings, paper.
std::string policy_text(const PolicyEntry& entry);

/// The same as a Markdown section.
std::string policy_markdown(const PolicyEntry& entry);

}  // namespace kv
