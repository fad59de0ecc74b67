#include "core/spec.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <numeric>

#include "core/error.hpp"

namespace kv {
namespace {

/// A whole positive int, or 0 when `text` is not one.
int positive(std::string_view text) {
  int n = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  return error == std::errc{} && stop == text.data() + text.size() && n > 0 ? n : 0;
}

}  // namespace

Block parse_block(const std::string& text) {
  if (text == "all") return {};
  const int n = positive(text);
  if (n == 0)
    throw ConfigError(fmt::format("replay.block: expected 'all' or a number of tokens of at least 1, got '{}'", text));
  return {n};
}

std::string name_of(Block block) { return block.tokens == 0 ? "all" : std::to_string(block.tokens); }

std::vector<int> parse_measure(const std::string& text, int tokens, int prompt_tokens) {
  int first = 0, last = tokens;
  if (text == "decode") {
    first = prompt_tokens;
  } else if (text == "prompt") {
    last = prompt_tokens;
  } else if (text.starts_with("last:") && positive(text.substr(5)) > 0) {
    first = std::max(0, tokens - positive(text.substr(5)));
  } else if (text != "all") {
    throw ConfigError(fmt::format("replay.measure: expected decode, prompt, all or last:N, got '{}'", text));
  }
  if (first >= last)
    throw ConfigError(
        fmt::format("replay.measure: '{}' measures nothing of a trace with {} tokens, {} of them the prompt", text,
                    tokens, prompt_tokens));
  std::vector<int> measured(static_cast<std::size_t>(last - first));
  std::iota(measured.begin(), measured.end(), first);
  return measured;
}

}  // namespace kv
