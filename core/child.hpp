// Runs a function in a forked child with a time limit, for work that may take the process down with it.
#pragma once
#include <chrono>
#include <functional>
#include <string>

namespace kv {

/// What became of the child.
struct ChildOutcome {
  enum Kind { returned, threw, died } kind;
  std::string text;  // returned: the result; threw: the exception's message; died: "crashed (signal 11)", "hung (no
                     // answer in 60 s)"
};

/// Runs `work` in a forked child. Its own process and all other threads go on unharmed whatever happens there; standard
/// output and error of the child are closed. HDF5 is at rest during the fork, so the child may use it.
ChildOutcome run_in_child(const std::function<std::string()>& work, std::chrono::milliseconds limit);

}  // namespace kv
