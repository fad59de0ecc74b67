#include "experiments/docs.hpp"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "core/metrics.hpp"
#include "experiments/keys.hpp"
#include "experiments/text_table.hpp"

namespace kv {
namespace {

/// A cell must not end its column.
std::string escape(const std::string& cell) {
  std::string out;
  for (const char c : cell) out += c == '|' ? "\\|" : std::string(1, c);
  return out;
}

std::string markdown(const TextTable& table) {
  std::string text;
  for (std::size_t i = 0; i < table.size(); ++i) {
    for (const std::string& cell : table[i]) text += fmt::format("| {} ", escape(cell));
    text += "|\n";
    for (std::size_t j = 0; i == 0 && j < table[i].size(); ++j) text += "|---";
    if (i == 0) text += "|\n";
  }
  return text;
}

std::string code(const std::string& text) { return text.empty() ? "" : fmt::format("`{}`", text); }

/// What `replay.*: auto` becomes, where it differs from block all, compress always, positions absolute.
std::string published_text(const Published& published) {
  std::vector<std::string> words;
  if (published.block != Block{}) words.push_back("block " + name_of(published.block));
  if (published.compress != Compress::always) words.push_back(std::string("compress ") + name_of(published.compress));
  if (published.positions != Positions::absolute)
    words.push_back(std::string("positions ") + name_of(published.positions));
  return fmt::format("{}", fmt::join(words, ", "));
}

std::string parameters_text(const PolicyEntry& entry) {
  const auto policy = entry.make();
  std::vector<std::string> words;
  for (const Field& field : policy->fields())
    words.push_back(fmt::format("`{}` [{}]", field.name, to_text(field.get())));
  return fmt::format("{}", fmt::join(words, ", "));
}

TextTable parameter_table(const PolicyEntry& entry) {
  const auto policy = entry.make();
  TextTable table{{"parameter", "default", "allowed", "meaning"}};
  for (const Field& field : policy->fields())
    table.push_back({field.name, to_text(field.get()), expectation(field), field.help});
  return table;
}

std::string settings_text(const PolicyEntry& entry) {
  const Published& p = entry.published;
  return fmt::format("block {}, compress {}, positions {}", name_of(p.block), name_of(p.compress),
                     name_of(p.positions));
}

constexpr const char* configs_intro = R"(# Configs

Made by `kvreplay docs configs`; a test compares. Run one with

    build/kvreplay run configs/quickstart.yaml [key=value ...] [--out DIR] [--dry-run] [--only key=value]

`--dry-run` prints the points, which of them are done, and the memory they need. Results go to `out/NAME`.

)";

constexpr const char* configs_rules = R"(
## How a file becomes points

- Everything outside `sweep` is the base. Each block of `sweep` starts from the base and may override any key of it; a
  file without `sweep` is a single block.
- `replay.block: 1` and `replay: {block: 1}` are the same key; maps merge deeply. A key that one map sets twice is an
  error. `policy: h2o` and `policy: {name: h2o}` are the same.
- Every list is an axis, and a block stands for the product of its axes, the first written outermost. An axis may list
  scalars or maps: `policy: [h2o, {name: snapkv, window: [16, 32]}]` are three choices.
- The lists under `zip` advance together and must have one length.
- `key=value` on the command line replaces base and axis alike; the value is read as YAML, so `budget=[10%,20%]` is an
  axis again.
- A parameter that stands beside its policy's name (in the same block, map or command line) must be that policy's. One
  that is inherited from the base, or given on the command line for all, goes to the policies that have it; it is an
  error when none has.
- A budget is used as written: `1` is one slot, `1.0` and `100%` are everything. `full` needs none and is the same run
  at every budget.
- Points that are the same run are run once, with the most `series` and `timing.repeats` that any of them asks for. A
  run is identified by its settings with `auto` resolved and by everything in the trace that can change a number, so
  adding blocks to a file keeps what is done.
- `--only key=value` keeps the points with that value; the same key twice means either value, different keys mean both.

## What happens to rows

A second `kvreplay run` of the same command runs only what is missing. `--retry-failed` runs points whose row says
`error` again, `--force` all; until then the exit code stays that of the first failed point. A row is replaced when its
successor is written, not before. A finished point runs again when `series` or more `timing.repeats` are asked for than
its row has. Points that their trace cannot serve are an error before the first run; with `on_invalid: skip` they become
rows with `status: skipped` and the reason.
)";

}  // namespace

std::string policies_markdown() {
  TextTable table{{"policy", "name", "parameters [default]", "published settings", "what it does", "paper"}};
  for (const PolicyEntry& entry : policies())
    table.push_back({entry.doc.title, code(entry.doc.name), parameters_text(entry), published_text(entry.published),
                     entry.doc.summary, entry.doc.paper});
  return markdown(table);
}

std::string metrics_markdown() {
  TextTable table{{"key", "metric", "unit", "better", "definition"}};
  for (const MetricDoc& doc : metric_docs())
    table.push_back({code(doc.name), doc.label, doc.unit, doc.better, doc.formula});
  return markdown(table);
}

std::string configs_markdown() {
  Keys keys;
  TextTable table{{"key", "default", "allowed", "meaning"}};
  for (const Field& field : fields_of(keys)) {
    const std::string value = to_text(field.get());
    table.push_back({code(field.name), value.empty() ? "" : code(value), expectation(field), field.help});
    if (field.name == "policy")
      table.push_back({code("policy.NAME"), "", "", "a parameter of the policy; `kvreplay policies NAME` lists them"});
  }
  for (const StructureKey& key : structure_keys) table.push_back({code(key.name), "", "", key.help});
  return configs_intro + std::string("## Keys\n\n") + markdown(table) + configs_rules;
}

std::string policies_text() {
  TextTable table;
  for (const PolicyEntry& entry : policies()) table.push_back({entry.doc.name, entry.doc.summary});
  return columns(table) + "\n`kvreplay policies NAME` shows a policy's parameters.\n";
}

std::string policy_text(const PolicyEntry& entry) {
  std::string text =
      fmt::format("{}: {}\n{}\nauto: {}\n", entry.doc.name, entry.doc.summary, entry.doc.paper, settings_text(entry));
  const TextTable table = parameter_table(entry);
  return text.append(table.size() == 1 ? "no parameters\n" : fmt::format("\n{}", columns(table)));
}

std::string policy_markdown(const PolicyEntry& entry) {
  const TextTable table = parameter_table(entry);
  return fmt::format("### {} (`{}`)\n\n{}\n{}. `auto`: {}.\n{}", entry.doc.title, entry.doc.name, entry.doc.summary,
                     entry.doc.paper, settings_text(entry),
                     table.size() == 1 ? "" : fmt::format("\n{}", markdown(table)));
}

}  // namespace kv
