#include "kernels/bench.hpp"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "core/synthetic.hpp"
#include "core/trace_writer.hpp"
#include "kernels/bandwidth.hpp"
#include "kernels/batch.hpp"

namespace kv {
namespace {

/// A made-up trace of one layer in a temporary file, for as long as it is needed.
class OneLayer {
 public:
  explicit OneLayer(Synthetic settings) {
    settings.layers = 1;
    TraceHeader header = synthetic_header(settings);
    file_ = std::filesystem::temp_directory_path() / fmt::format("kvreplay-bench-{}.h5", getpid());
    TraceWriter writer(file_, header);
    writer.write_layer(header.layers.front(), synthetic_layer(settings, 0));
    writer.close();
    session_ = std::make_unique<Session>(file_);
  }
  ~OneLayer() {
    std::error_code ignored;
    std::filesystem::remove(file_, ignored);
  }
  OneLayer(const OneLayer&) = delete;
  OneLayer& operator=(const OneLayer&) = delete;
  Session& session() { return *session_; }

 private:
  std::filesystem::path file_;
  std::unique_ptr<Session> session_;
};

/// Decode at a full cache: what is timed and what it is held against.
struct DecodeCase {
  std::string work, policy;
  std::vector<std::pair<std::string, std::string>> parameters;
  int budget = 1024, points = 1;
  double must = 1.08, goal = 1.01;
  Synthetic shape{};
};

constexpr int decode_steps = 256, layers = 32, repeats = 5;

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

/// What the CPU engine keeps of layer 0 must be what every layer of the device kept, and the errors must agree.
void check(Session& session, const DevicePoint& point, const ReplayResult& device, const std::string& work) {
  const ReplayResult cpu = replay(session, *point.entry, *point.policy, *point.settings);
  const auto heads = static_cast<std::size_t>(cpu.kv_heads);
  std::size_t differing = 0;
  for (std::size_t i = 0; i < device.final_position.size(); ++i)
    differing += device.final_position[i] != cpu.final_position[i % heads];
  double got = 0, expected = 0;
  for (std::size_t i = 0; i < cpu.error2.size(); ++i) got += device.error2[i], expected += cpu.error2[i];
  // A tie that rounding decides may change a head; more than that is wrong.
  if (!(static_cast<double>(differing) <= 0.05 * static_cast<double>(device.final_position.size())) ||
      !(std::abs(got - expected) <= 5e-3 * expected))
    throw InternalError(fmt::format("bench: {}: {} of {} heads keep other slots than on the CPU, squared error {} against {}: "
                                    "nothing is timed",
                                    work, differing, device.final_position.size(), got, expected));
}

BenchRow time_decode(const DecodeCase& c, const Bandwidth& rates) {
  Synthetic shape = c.shape;
  shape.tokens = c.budget + decode_steps, shape.prompt_tokens = c.budget;
  OneLayer one(shape);
  TraceHeader header = one.session().header();
  const PolicyEntry& entry = find_policy(c.policy);
  const std::shared_ptr<BoundPolicy> policy = entry.make();
  for (const Field& field : policy->fields())
    for (const auto& [name, value] : c.parameters)
      if (field.name == name) field.set(parse_value(field, value));
  ReplaySettings settings;
  settings.budget = c.budget;
  settings.measured = parse_measure("decode", header.tokens, header.prompt_tokens);
  const DevicePoint point{&entry, policy.get(), &settings};

  header.layers.resize(layers, header.layers.front());
  const DeviceTrace trace(header);
  DeviceLayer layer(trace, one.session(), 0, false);
  cudaStream_t stream = nullptr;
  const std::vector<BatchLayer> all(layers, {layer.measured(trace, settings.measured, stream), nullptr});
  const std::vector<DevicePoint> points(static_cast<std::size_t>(c.points), point);
  const BatchPlan plan(header, points);
  Batch batch(trace, header, plan, points, all, 0, Timing::launches);
  std::vector<double> us;
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    batch.run(stream);
    const double steps = batch.steps_us(stream);
    if (repeat == 0) {
      std::vector<ReplayResult> results(points.size(), empty_result(header, settings));
      std::vector<std::exception_ptr> errors(points.size());
      batch.collect(results, errors, stream);
      if (errors[0]) std::rethrow_exception(errors[0]);
      check(one.session(), point, results.back(), c.work);
    } else {
      us.push_back(steps / decode_steps / c.points);
    }
  }
  const auto [low, high] = std::minmax_element(us.begin(), us.end());
  const double bytes = static_cast<double>(layers) * shape.kv_heads * c.budget * 2.0 * shape.head_dim *
                       static_cast<double>(size_of(shape.dtype));
  BenchRow row{c.work, "K and V held / read bandwidth", median(us), bytes / rates.read * 1e6, c.must, c.goal,
               (*high - *low) / median(us), ""};
  return row;
}

std::vector<DecodeCase> decode_cases() {
  std::vector<DecodeCase> cases;
  const auto add = [&](DecodeCase c) {
    c.work = fmt::format("{} {} slots{}", c.work.empty() ? c.policy : c.work, c.budget,
                         c.points > 1 ? fmt::format(", {} points", c.points) : "");
    cases.push_back(std::move(c));
  };
  const std::vector<std::pair<std::string, std::string>> per_head{{"share", "kv_head"}};
  for (const int budget : {1024, 2048}) {
    add({"", "h2o", {}, budget});
    add({"tova (per head)", "tova", per_head, budget});
    add({"streaming_llm (absolute)", "streaming_llm", {}, budget});
    add({"", "keydiff", {}, budget});
  }
  add({"", "weighted_kv", {}, 1024, 1, 1.12, 1.03});
  add({"", "cam", {}, 1024, 1, 1.12, 1.03});
  for (const char* policy : {"h2o", "streaming_llm", "keydiff"}) add({"", policy, {}, 256, 1, 0.70, 0.50});
  add({"tova (per head)", "tova", per_head, 256, 1, 0.70, 0.50});
  add({"", "weighted_kv", {}, 256, 1, 0.70, 0.50});
  add({"tova (as published, per layer)", "tova", {}, 1024, 1, 1.12, 1.03});
  Synthetic small;
  small.head_dim = 64, small.query_heads = 24, small.kv_heads = 8;
  add({"h2o, d 64, group 3,", "h2o", {}, 1024, 1, 1.08, 1.01, small});
  add({"", "h2o", {}, 1024, 16, 1.08, 1.01});
  for (const int budget : {4096, 8192}) add({"", "h2o", {}, budget, 1, 1.15, 1.02});
  return cases;
}

}  // namespace

BenchResult bench_device(const std::string& only, const BenchPeers& peers,
                         const std::function<void(const BenchRow&)>& finished) {
  const std::vector<DeviceInfo> all = devices();
  if (all.empty()) throw CudaError("bench: no GPU: " + why_no_device());
  const Bandwidth rates = measure_bandwidth();
  BenchResult result{all.front().name, rates.copy, rates.read, {}};
  const auto add = [&](const BenchRow& row) {
    result.rows.push_back(row);
    finished(row);
  };
  for (const DecodeCase& c : decode_cases())
    if (c.work.find(only) != std::string::npos) add(time_decode(c, rates));
  (void)peers;
  return result;
}

}  // namespace kv
