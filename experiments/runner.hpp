// `kvreplay run`: plans a sweep, then runs what its output folder lacks.
#pragma once
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace kv {

struct RunOptions {
  std::filesystem::path config;
  std::vector<std::string> overrides, only;  // "key=value"
  std::optional<std::filesystem::path> out;  // default out/<name of the config>
  bool dry_run = false;                      // print the plan, write nothing
  bool force = false;                        // run everything again
  bool retry_failed = false;                 // run again what has a row with status error
  int jobs = 0;                              // worker threads; 0 = one per core
  std::size_t device_memory = 0;             // bytes of each GPU to stay below; 0 = most of what is free
  std::vector<std::string> argv;             // for the manifest
};

/// Returns the exit code: 0, that of the first failed point, or 130 after Ctrl-C.
int run_sweep(const RunOptions& options);

/// The exit code of an exception: ConfigError 2, TraceError 3, CudaError 4, any other 1.
int exit_code(const std::exception& error);

}  // namespace kv
