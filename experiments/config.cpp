#include "experiments/config.hpp"

#include <fmt/core.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "core/error.hpp"

namespace kv {
namespace {

// Aliases make a small YAML file an endless or an exponentially large tree; no real config comes near these.
constexpr int max_depth = 32;
constexpr int max_nodes = 200'000;

/// Turns yaml-cpp's tree into ours.
class Reader {
 public:
  Reader(std::string file, bool lines) : file_(std::move(file)), lines_(lines) {}

  Node read(const YAML::Node& yaml, int depth = 0) {
    Node node;
    node.place = place(yaml);
    if (depth > max_depth || ++nodes_ > max_nodes)
      fail(node.place, "nested too deeply or too large; does an anchor contain itself?");
    if (yaml.IsMap()) {
      read_map(yaml, depth, node);
    } else if (yaml.IsSequence()) {
      node.kind = Node::Kind::list;
      for (const YAML::Node& item : yaml) node.items.push_back(read(item, depth + 1));
    } else if (yaml.IsScalar() && !yaml.Scalar().empty()) {
      node.kind = Node::Kind::scalar;
      node.text = yaml.Scalar();
    } else {
      fail(node.place, "a value is missing");
    }
    return node;
  }

 private:
  void read_map(const YAML::Node& yaml, int depth, Node& node) {
    for (const auto& entry : yaml) {
      if (!entry.first.IsScalar()) fail(place(entry.first), "a key must be a word");
      const std::string key = entry.first.Scalar();
      const Place at = place(entry.first);
      if (std::ranges::any_of(node.members, [&](const Member& m) { return m.key == key; }))
        fail(at, fmt::format("{}: given twice", key));
      if (entry.second.IsNull()) fail(at, fmt::format("{}: a value is missing", key));
      node.members.push_back({key, at, read(entry.second, depth + 1)});
    }
  }

  Place place(const YAML::Node& yaml) const { return {file_, lines_ ? std::max(0, yaml.Mark().line + 1) : 0}; }

  std::string file_;
  bool lines_;
  int nodes_ = 0;
};

/// Calls `body`, turning yaml-cpp's exceptions into ours.
template <class F>
auto guarded(const std::string& file, bool lines, const std::string& subject, F body) {
  try {
    return body();
  } catch (const YAML::Exception& error) {
    fail({file, lines ? std::max(0, error.mark.line + 1) : 0}, subject + error.msg);
  }
}

Node parse_overrides(const std::vector<std::string>& overrides) {
  Node node;
  node.place = {"command line", 0};
  for (const std::string& text : overrides) {
    const std::size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) fail(node.place, fmt::format("expected key=value, got '{}'", text));
    const std::string key = text.substr(0, equals);
    if (std::ranges::any_of(node.members, [&](const Member& m) { return m.key == key; }))
      fail(node.place, fmt::format("{}: given twice", key));
    node.members.push_back({key, node.place, guarded("command line", false, key + ": ", [&] {
                              const YAML::Node yaml = YAML::Load(text.substr(equals + 1));
                              if (yaml.IsNull()) fail(node.place, fmt::format("{}: a value is missing", key));
                              return Reader("command line", false).read(yaml);
                            })});
  }
  return node;
}

}  // namespace

std::string to_text(const Place& place) {
  return place.line > 0 ? fmt::format("{}:{}", place.file, place.line) : place.file;
}

void fail(const Place& place, const std::string& message) {
  throw ConfigError(fmt::format("{}: {}", to_text(place), message));
}

Config parse_config(const std::string& text, const std::string& name, const std::vector<std::string>& overrides) {
  Config config{name, text, {}, parse_overrides(overrides)};
  config.root = guarded(name, true, "", [&] {
    const std::vector<YAML::Node> documents = YAML::LoadAll(text);
    if (documents.size() > 1)
      fail({name, 0},
           fmt::format("expected one YAML map, found {} documents ('---' starts another)", documents.size()));
    if (documents.empty() || documents.front().IsNull()) fail({name, 0}, "expected one YAML map, found nothing");
    Node root = Reader(name, true).read(documents.front());
    if (root.kind != Node::Kind::map) fail(root.place, "expected a map of keys such as 'policy: h2o'");
    return root;
  });
  return config;
}

Config read_config(const std::filesystem::path& file, const std::vector<std::string>& overrides) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  if (!in || std::filesystem::is_directory(file))
    throw ConfigError(fmt::format("{}: cannot be read: {}", file.string(), std::strerror(in ? EISDIR : errno)));
  text << in.rdbuf();
  return parse_config(text.str(), file.string(), overrides);
}

}  // namespace kv
