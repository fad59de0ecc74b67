// OUT/series/RUN.h5: every query's errors, every step's slots and what the cache held at the end.
#pragma once
#include <filesystem>
#include <string>

#include "core/replay.hpp"

namespace kv {

/// Writes `file` under another name and renames it. Throws TraceError when it cannot be written.
void write_series(const std::filesystem::path& file, const std::string& run, const TraceHeader& header,
                  const ReplayResult& result);

}  // namespace kv
