// A config file and `key=value` overrides as plain trees. Only config.cpp includes yaml-cpp; what a key means is not
// known here.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

namespace kv {

/// Where something was written: a line of a file, or a file as a whole or the command line (line 0).
struct Place {
  std::string file;
  int line = 0;
  auto operator<=>(const Place&) const = default;
};

/// "configs/quickstart.yaml:12"
std::string to_text(const Place& place);

/// Throws ConfigError "file:line: message".
[[noreturn]] void fail(const Place& place, const std::string& message);

struct Member;

/// A YAML value. Scalars keep their text as written, since `1` and `1.0` are different budgets.
struct Node {
  enum class Kind { scalar, list, map } kind = Kind::map;
  std::string text;             // of a scalar
  std::vector<Node> items;      // of a list
  std::vector<Member> members;  // of a map, in file order, keys unique
  Place place;
};

struct Member {
  std::string key;
  Place place;  // of the key
  Node value;
};

struct Config {
  std::string file, text;
  Node root;       // a map
  Node overrides;  // a map: the command line's key=value
};

/// Reads `file` as one YAML map. Throws ConfigError with file and line.
Config read_config(const std::filesystem::path& file, const std::vector<std::string>& overrides);

/// The same from memory; `name` stands for the file in messages.
Config parse_config(const std::string& text, const std::string& name, const std::vector<std::string>& overrides);

}  // namespace kv
