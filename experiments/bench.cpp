#include "experiments/bench.hpp"

#include <fmt/core.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/error.hpp"
#include "experiments/text_table.hpp"
#include "kernels/bench.hpp"
#include "kernels/engine.hpp"

namespace kv {
namespace {

BenchPeers read_peers(const std::filesystem::path& file) {
  if (file.empty()) return {};
  std::ifstream in(file);
  if (!in) throw ConfigError(fmt::format("--peers: {} cannot be read", file.string()));
  try {
    const auto json = nlohmann::json::parse(in);
    return {json.value("gemm_flops", 0.0), json.value("attention_16k_us", 0.0), json.value("eager_h2o_us", 0.0),
            json.value("eager_cpu_h2o_us", 0.0)};
  } catch (const nlohmann::json::exception& error) {
    throw ConfigError(fmt::format("--peers: {}: {}", file.string(), error.what()));
  }
}

std::string number(double x, const char* shape) {
  return std::isfinite(x) && x != 0 ? fmt::format(fmt::runtime(shape), x) : "-";
}

nlohmann::json to_json(const BenchRow& row) {
  return {{"work", row.work},
          {"us", row.us},
          {"floor", row.floor},
          {"floor_us", row.floor_us},
          {"ratio", row.ratio()},
          {"must", row.must},
          {"goal", row.goal},
          {"noise", row.noise},
          {"cold_us", row.cold_us > 0 ? nlohmann::json(row.cold_us) : nullptr},
          {"note", row.note}};
}

nlohmann::json to_json(const DeviceClocks& clocks) {
  return {{"sm_mhz", clocks.sm_mhz > 0 ? nlohmann::json(clocks.sm_mhz) : nullptr}, {"throttled", clocks.throttled}};
}

/// `device` is null where there is none.
void write_json(const std::filesystem::path& file, const BenchRun& run, const std::optional<BenchDevice>& device) {
  nlohmann::json json{{"device", nullptr}, {"rows", nlohmann::json::array()}};
  if (device)
    json.update({{"device", device->name},
                 {"copy", device->copy},
                 {"read", device->read},
                 {"clocks", {{"before", to_json(device->before)}, {"after", to_json(device->after)}}}});
  for (const BenchRow& row : run.rows()) json["rows"].push_back(to_json(row));
  std::ofstream out(file);
  out << json.dump(1) << '\n';
  if (!out.flush()) throw ConfigError(fmt::format("--json: {} cannot be written", file.string()));
}

std::string to_text(const DeviceClocks& before, const DeviceClocks& after) {
  if (before.sm_mhz == 0 || after.sm_mhz == 0) return "clocks unknown";
  const auto one = [](const DeviceClocks& clocks) {
    return fmt::format("{} MHz{}", clocks.sm_mhz,
                       clocks.throttled.empty() ? "" : fmt::format(" ({})", clocks.throttled));
  };
  return fmt::format("multiprocessors at {} before the rows, {} after", one(before), one(after));
}

void print(const BenchRun& run, const std::optional<BenchDevice>& device) {
  if (device)
    fmt::print("{}: copies {:.2f} TB/s, reads {:.2f} TB/s; {}\n", device->name, device->copy * 1e-12,
               device->read * 1e-12, to_text(device->before, device->after));
  TextTable table{{"work", "us", "cold us", "floor us", "ratio", "must", "goal", "noise", "floor", "note"}};
  for (const BenchRow& row : run.rows())
    table.push_back({row.work, fmt::format("{:.2f}", row.us), number(row.cold_us, "{:.2f}"),
                     number(row.floor_us, "{:.2f}"), number(row.ratio(), "{:.3f}"), number(row.must, "{:.2f}"),
                     number(row.goal, "{:.2f}"), fmt::format("{:.1f} %", 100 * row.noise), row.floor, row.note});
  fmt::print("{}", columns(table));
}

}  // namespace

void bench(const BenchOptions& options) {
  const BenchPeers peers = read_peers(options.peers);
  BenchRun run(options.only, [](const BenchRow& row) {
    fmt::print(stderr, "{}: {:.1f} us, {} of its floor\n", row.work, row.us, number(row.ratio(), "{:.3f}"));
  });
  bench_cpu(run, peers);
  std::optional<BenchDevice> device;
  if (!devices().empty()) device = bench_device(run, peers);
  print(run, device);
  if (!options.json.empty()) write_json(options.json, run, device);
  if (!run.failure().empty()) throw InternalError(run.failure());
  if (!device) throw CudaError(fmt::format("bench: the CPU's rows only: no GPU: {}", why_no_device()));
}

}  // namespace kv
