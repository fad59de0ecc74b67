#include "core/budget.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <utility>

#include "core/error.hpp"
#include "core/spec.hpp"

namespace kv {
namespace {

template <class T>
bool parse_number(std::string_view text, T& out) {
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc{} && stop == text.data() + text.size();
}

bool parse_share(std::string_view text, double whole, Budget& out) {
  double x = 0;
  if (!parse_number(text, x) || !(x > 0 && x <= whole)) return false;
  out.kind = Budget::Kind::share, out.share = x / whole;
  return true;
}

bool parse_bytes(std::string_view text, Budget& out) {
  for (const auto& [unit, size] : {std::pair{"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}}) {
    if (!text.ends_with(unit)) continue;
    double x = 0;
    if (!parse_number(text.substr(0, text.size() - 3), x) || !(x > 0 && x * size < 9e18)) return false;
    out.kind = Budget::Kind::bytes, out.amount = static_cast<std::int64_t>(x * size);
    return true;
  }
  return false;
}

bool parse_slots(std::string_view text, Budget& out) {
  std::int64_t n = 0;
  if (!parse_number(text, n) || n < 1) return false;
  out.kind = Budget::Kind::slots, out.amount = n;
  return true;
}

}  // namespace

Budget parse_budget(const std::string& text) {
  Budget budget;
  budget.text = text;
  const std::string_view view = text;
  const bool good = view.ends_with('%')
                        ? parse_share(view.substr(0, view.size() - 1), 100, budget)
                        : parse_bytes(view, budget) || parse_slots(view, budget) ||
                              (view.find_first_not_of("0123456789") != view.npos && parse_share(view, 1, budget));
  if (!good)
    throw ConfigError(
        fmt::format("budget: expected a share of the prompt such as 20% (or 0.2, at most 100%), slots per KV head "
                    "such as 512, or bytes such as 64MiB; got '{}'",
                    text));
  return budget;
}

int slots_of(const Budget& budget, const TraceHeader& trace, const SlotBytes& bytes) {
  constexpr std::int64_t most = std::numeric_limits<int>::max();
  if (budget.kind == Budget::Kind::slots) return static_cast<int>(std::min(budget.amount, most));
  if (budget.kind == Budget::Kind::share)
    return std::max(1, share_of(budget.share, trace.prompt_tokens > 0 ? trace.prompt_tokens : trace.tokens));
  const std::int64_t heads = static_cast<std::int64_t>(trace.layers.size()) * trace.model.kv_heads;
  const std::int64_t rest = budget.amount / heads - static_cast<std::int64_t>(bytes.per_head);
  if (rest < static_cast<std::int64_t>(bytes.slot()))
    throw ConfigError(
        fmt::format("budget: {} is less than one slot in each of the {} recorded heads; the least is {} bytes",
                    budget.text, heads, heads * static_cast<std::int64_t>(bytes.slot() + bytes.per_head)));
  return static_cast<int>(std::min(rest / static_cast<std::int64_t>(bytes.slot()), most));
}

}  // namespace kv
