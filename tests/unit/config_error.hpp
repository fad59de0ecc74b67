// The text of a ConfigError, for tests that compare messages.
#pragma once
#include <string>

#include "core/error.hpp"

namespace kv {

/// What the ConfigError thrown by `body` says; "nothing was thrown" when none is. Other exceptions pass through.
template <class F>
std::string config_error(F body) {
  try {
    body();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "nothing was thrown";
}

}  // namespace kv
