// The four kinds of failure. `main` maps them to exit codes and prints `what()` as one line; nothing below `main`
// exits.
#pragma once
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kv {

/// The user's YAML or command line is wrong (exit code 2). The message names file and line, the key, what was expected
/// and the nearest valid name.
struct ConfigError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A trace cannot be read or does not hold what it must (exit code 3). The message names file, dataset and index.
struct TraceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The GPU failed or is missing (exit code 4). The message names the call and what to change.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A broken invariant of ours (exit code 1): never reachable from user input.
struct InternalError : std::logic_error {
  using std::logic_error::logic_error;
};

/// The candidate with the smallest Levenshtein distance to `name`, or "" when none is close enough to be a typo of it.
std::string nearest(std::string_view name, std::span<const std::string> candidates);

/// "; did you mean 'h2o'?" or "" when no candidate is close.
std::string did_you_mean(std::string_view name, std::span<const std::string> candidates);

}  // namespace kv

/// Throws InternalError with the condition and its place when a promise of our own code does not hold.
#define KV_CHECK(condition)                                                              \
  do {                                                                                   \
    if (!(condition))                                                                    \
      throw ::kv::InternalError(std::string(__FILE__) + ":" + std::to_string(__LINE__) + \
                                ": broken invariant: " #condition);                      \
  } while (false)
