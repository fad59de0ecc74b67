#include "experiments/manifest.hpp"

#include <fmt/chrono.h>
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "core/metrics.hpp"
#include "experiments/results.hpp"
#include "experiments/version.hpp"
#include "kernels/engine.hpp"

namespace kv {
namespace {

using Json = nlohmann::ordered_json;
constexpr const char* schema = "kvreplay/1";

std::string utc_now() {
  const auto now = std::chrono::floor<std::chrono::seconds>(std::chrono::system_clock::now());
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::chrono::system_clock::to_time_t(now)));
}

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "";
}

std::string cpu_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "";
}

/// The manifest of earlier runs into this folder, or an empty object.
Json read_old(const std::filesystem::path& file) {
  std::ifstream in(file);
  if (!in) return Json::object();
  Json old = Json::parse(in, nullptr, false);
  if (!old.is_object() || !old.contains("schema") || old["schema"] != schema)
    fail({file.string(), 0}, fmt::format("is not a manifest of schema {}; choose another --out", schema));
  return old;
}

Json describe(const TraceHeader& header, const std::string& identity) {
  Json layers = Json::array();
  for (const LayerInfo& layer : header.layers) layers.push_back(layer.index);
  return {{"sha256", header.content_sha256},
          {"identity", identity},
          {"dataset", header.dataset},
          {"model", header.model_id},
          {"tokens", header.tokens},
          {"dtype", name_of(header.dtype)},
          {"prompt_tokens", header.prompt_tokens},
          {"layers", layers}};
}

/// The GPUs, when a point runs on them.
Json describe_devices(const Plan& plan) {
  Json list = Json::array();
  if (std::ranges::none_of(plan.points, [](const Point& point) { return point.backend == "cuda"; })) return list;
  for (const DeviceInfo& device : devices())
    list.push_back(
        {{"name", device.name}, {"memory_bytes", device.memory}, {"multiprocessors", device.multiprocessors}});
  return list;
}

void add_catalogue(Json& manifest, const Plan& plan) {
  for (const Point& point : plan.points) {
    const PolicyDoc& doc = point.entry->doc;
    manifest["policies"][point.keys.policy] = {{"title", doc.title}, {"paper", doc.paper}, {"summary", doc.summary}};
    manifest["traces"][point.keys.trace] = describe(plan.header(point), plan.identities.at(point.keys.trace));
  }
  for (const MetricDoc& doc : metric_docs())
    manifest["metrics"][doc.name] = {
        {"label", doc.label}, {"unit", doc.unit}, {"better", doc.better}, {"formula", doc.formula}};
}

}  // namespace

void write_manifest(const std::filesystem::path& dir, const Config& config, const Plan& plan,
                    const std::vector<std::string>& argv, int threads) {
  const std::filesystem::path file = dir / "manifest.json";
  const Json old = read_old(file);
  Json manifest;
  manifest["schema"] = schema;
  manifest["argv"] = argv;
  manifest["config"] = {{"path", config.file}, {"text", config.text}};
  manifest["version"] = build::version;
  manifest["git"] = {{"sha", build::git_sha}, {"dirty", build::git_dirty}};
  manifest["build"] = {{"compiler", build::compiler}, {"flags", build::flags}, {"cuda", build::cuda_version}};
  manifest["device"] = {{"kind", "cpu"}, {"name", cpu_name()}, {"cores", std::thread::hardware_concurrency()}};
  manifest["devices"] = describe_devices(plan);
  manifest["host"] = {{"name", host_name()}, {"threads", threads}};
  const std::string now = utc_now();
  manifest["started"] = old.contains("started") ? old["started"] : Json(now);
  manifest["updated"] = now;
  for (const char* kept : {"policies", "traces"}) manifest[kept] = old.contains(kept) ? old[kept] : Json::object();
  add_catalogue(manifest, plan);
  write_atomically(file, manifest.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace kv
