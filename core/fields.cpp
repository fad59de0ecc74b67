#include "core/fields.hpp"

#include <fmt/core.h>
#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "core/error.hpp"

namespace kv {
namespace {

template <class T>
bool parse_number(const std::string& text, T& out) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, out);
  return error == std::errc{} && stop == end;
}

bool parse_bool(const std::string& text, bool& out) {
  if (text == "true" || text == "True") return out = true, true;
  if (text == "false" || text == "False") return out = false, true;
  return false;
}

bool parse(const Field& field, const std::string& text, Value& out) {
  for (const std::string& choice : field.choices)
    if (choice == text) return out = text, true;
  if (field.type == "bool") {
    bool b = false;
    return parse_bool(text, b) && (out = b, true);
  }
  if (field.type == "int") {
    std::int64_t i = 0;
    return parse_number(text, i) && static_cast<double>(i) >= field.low && static_cast<double>(i) <= field.high &&
           (out = i, true);
  }
  if (field.type == "number") {
    double x = 0;  // the comparison refuses NaN
    return parse_number(text, x) && x >= field.low && x <= field.high && (out = x, true);
  }
  return field.type == "text" && (out = text, true);
}

}  // namespace

Value parse_value(const Field& field, const std::string& text) {
  Value value;
  if (parse(field, text, value)) return value;
  throw ConfigError(fmt::format("{}: expected {}, got '{}'{}", field.name, expectation(field), text,
                                did_you_mean(text, field.choices)));
}

std::string to_text(const Value& value) {
  if (const bool* b = std::get_if<bool>(&value)) return *b ? "true" : "false";
  if (const std::int64_t* i = std::get_if<std::int64_t>(&value)) return std::to_string(*i);
  if (const double* x = std::get_if<double>(&value)) {
    std::string text = fmt::format("{}", *x);  // shortest text that reads back to the same bits
    return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
  }
  return std::get<std::string>(value);
}

std::string expectation(const Field& field) {
  if (field.type == "choice") return fmt::format("one of {}", fmt::join(field.choices, ", "));
  if (field.type == "int")
    return fmt::format("int in [{}, {}]", static_cast<std::int64_t>(field.low), static_cast<std::int64_t>(field.high));
  if (field.type == "number")
    return fmt::format("number in [{}, {}]{}{}", field.low, field.high, field.choices.empty() ? "" : " or ",
                       fmt::join(field.choices, ", "));
  return field.type == "bool" ? "true or false" : "text";
}

}  // namespace kv
