#include "experiments/bench.hpp"

#include <fmt/core.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "experiments/text_table.hpp"
#include "kernels/bench.hpp"

namespace kv {
namespace {

BenchPeers read_peers(const std::filesystem::path& file) {
  if (file.empty()) return {};
  std::ifstream in(file);
  if (!in) throw ConfigError(fmt::format("--peers: {} cannot be read", file.string()));
  try {
    const auto json = nlohmann::json::parse(in);
    return {json.value("gemm_flops", 0.0), json.value("attention_16k_us", 0.0), json.value("eager_h2o_us", 0.0)};
  } catch (const nlohmann::json::exception& error) {
    throw ConfigError(fmt::format("--peers: {}: {}", file.string(), error.what()));
  }
}

std::string number(double x, const char* shape) {
  return std::isfinite(x) && x != 0 ? fmt::format(fmt::runtime(shape), x) : "-";
}

nlohmann::json to_json(const BenchRow& row) {
  return {{"work", row.work},         {"us", row.us},         {"floor", row.floor},
          {"floor_us", row.floor_us}, {"ratio", row.ratio()}, {"must", row.must},
          {"goal", row.goal},         {"noise", row.noise},   {"note", row.note}};
}

void write_json(const std::filesystem::path& file, const BenchResult& result) {
  nlohmann::json json{
      {"device", result.device}, {"copy", result.copy}, {"read", result.read}, {"rows", nlohmann::json::array()}};
  for (const BenchRow& row : result.rows) json["rows"].push_back(to_json(row));
  std::ofstream out(file);
  out << json.dump(1) << '\n';
  if (!out.flush()) throw ConfigError(fmt::format("--json: {} cannot be written", file.string()));
}

}  // namespace

void bench(const BenchOptions& options) {
  const BenchResult result = bench_device(options.only, read_peers(options.peers), [](const BenchRow& row) {
    fmt::print(stderr, "{}: {:.1f} us, {} of its floor\n", row.work, row.us, number(row.ratio(), "{:.3f}"));
  });
  TextTable table{{"work", "us", "floor us", "ratio", "must", "goal", "noise", "floor", "note"}};
  for (const BenchRow& row : result.rows)
    table.push_back({row.work, fmt::format("{:.2f}", row.us), number(row.floor_us, "{:.2f}"),
                     number(row.ratio(), "{:.3f}"), number(row.must, "{:.2f}"), number(row.goal, "{:.2f}"),
                     fmt::format("{:.1f} %", 100 * row.noise), row.floor, row.note});
  fmt::print("{}: copies {:.2f} TB/s, reads {:.2f} TB/s\n{}", result.device, result.copy * 1e-12, result.read * 1e-12,
             columns(table));
  if (!options.json.empty()) write_json(options.json, result);
  if (!result.failure.empty()) throw InternalError(result.failure);
}

}  // namespace kv
