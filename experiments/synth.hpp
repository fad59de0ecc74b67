// `kvreplay synth FILE`: writes a synthetic trace.
#pragma once
#include <filesystem>

#include "core/synthetic.hpp"

namespace kv {

/// Writes `file` layer by layer, with a line on stdout for each. Throws ConfigError, TraceError.
void synth(const std::filesystem::path& file, const Synthetic& settings);

}  // namespace kv
