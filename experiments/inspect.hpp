// `kvreplay inspect TRACE`: what a trace holds, how large it is, how true its replay is, and what cannot run on it.
#pragma once
#include <filesystem>

namespace kv {

/// Prints the report. Throws TraceError.
void inspect(const std::filesystem::path& trace);

}  // namespace kv
