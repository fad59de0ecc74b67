// The output folder's manifest.json: who made these rows, from what, with which program.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "experiments/plan.hpp"

namespace kv {

/// Writes DIR/manifest.json, keeping the start time, policies and traces of an earlier one. Throws ConfigError when
/// what is there is no manifest of this schema.
void write_manifest(const std::filesystem::path& dir, const Config& config, const Plan& plan,
                    const std::vector<std::string>& argv, int threads);

}  // namespace kv
