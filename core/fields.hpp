// Typed settings, listed once. A struct names its fields in `describe(field)`; reading, ranges, help, README tables,
// rows and test corners all visit that one list.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

namespace kv {

/// A setting's value with its YAML type.
using Value = std::variant<bool, std::int64_t, double, std::string>;

/// Inclusive bounds of a number.
struct Range {
  double low, high;
};

/// Bounds of a number that may also be a word; in the object the word is NaN.
struct RangeOr {
  double low, high;
  const char* word;
};

/// Names of an enumeration's members, in the order of their values.
template <std::size_t N>
struct Choices {
  std::array<const char*, N> names;
};
template <class... Names>
Choices(Names...) -> Choices<sizeof...(Names)>;

/// One setting of one object: what it is called, what it may be, and how to read and write it there.
struct Field {
  std::string name, help;
  std::string type;                  // "bool", "int", "number", "text" or "choice"
  std::vector<std::string> choices;  // of a "choice"; of a "number" the words it may also be
  double low = 0, high = 0;          // of an "int" or "number"
  std::function<Value()> get;
  std::function<void(const Value&)> set;  // expects the type that get() returns, within range
};

namespace detail {

struct FieldLister {
  std::vector<Field>& fields;

  void operator()(const char* name, bool& x, const char* help) {
    fields.push_back(
        {name, help, "bool", {}, 0, 0, [&x] { return Value(x); }, [&x](const Value& v) { x = std::get<bool>(v); }});
  }
  void operator()(const char* name, int& x, Range range, const char* help) {
    fields.push_back({name,
                      help,
                      "int",
                      {},
                      range.low,
                      range.high,
                      [&x] { return Value(std::int64_t{x}); },
                      [&x](const Value& v) { x = static_cast<int>(std::get<std::int64_t>(v)); }});
  }
  void operator()(const char* name, double& x, Range range, const char* help) {
    fields.push_back({name,
                      help,
                      "number",
                      {},
                      range.low,
                      range.high,
                      [&x] { return Value(x); },
                      [&x](const Value& v) { x = std::get<double>(v); }});
  }
  void operator()(const char* name, double& x, RangeOr range, const char* help) {
    const std::string word = range.word;
    fields.push_back({name,
                      help,
                      "number",
                      {word},
                      range.low,
                      range.high,
                      [&x, word] { return std::isnan(x) ? Value(word) : Value(x); },
                      [&x](const Value& v) {
                        const double* number = std::get_if<double>(&v);
                        x = number ? *number : std::nan("");
                      }});
  }
  void operator()(const char* name, std::string& x, const char* help) {
    fields.push_back({name,
                      help,
                      "text",
                      {},
                      0,
                      0,
                      [&x] { return Value(x); },
                      [&x](const Value& v) { x = std::get<std::string>(v); }});
  }
  template <class E, std::size_t N>
  requires std::is_enum_v<E>
  void operator()(const char* name, E& x, Choices<N> choices, const char* help) {
    std::vector<std::string> names(choices.names.begin(), choices.names.end());
    fields.push_back({name, help, "choice", names, 0, 0,
                      [&x, names] {
                        const auto i = static_cast<std::size_t>(x);
                        return Value(i < names.size() ? names[i] : "unnamed choice " + std::to_string(i));
                      },
                      [&x, names](const Value& v) {
                        for (std::size_t i = 0; i < names.size(); ++i)
                          if (names[i] == std::get<std::string>(v)) x = static_cast<E>(i);
                      }});
  }
};

}  // namespace detail

/// The fields of `object`, bound to it: it must outlive the list. An object without `describe` has none.
template <class T>
std::vector<Field> fields_of(T& object) {
  std::vector<Field> fields;
  detail::FieldLister lister{fields};
  if constexpr (requires { object.describe(lister); }) object.describe(lister);
  return fields;
}

/// Reads `text` (a YAML scalar) as the value of `field`. Throws ConfigError naming the field, what was expected and the
/// nearest valid choice, without a place: the caller knows file and line.
Value parse_value(const Field& field, const std::string& text);

/// As YAML writes it: "true", "16", "0.5", "max".
std::string to_text(const Value& value);

/// "int in [1, 4096]", "one of sum, mean_visible": for help and README tables.
std::string expectation(const Field& field);

}  // namespace kv
