// The CUDA engine's rows of `kvreplay bench`.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "kernels/bandwidth.hpp"
#include "kernels/batch.hpp"
#include "kernels/bench_sweep.hpp"
#include "kernels/bench_work.hpp"
#include "kernels/clocks.hpp"
#include "kernels/event_times.hpp"

namespace kv {
namespace {

/// Decode at a full cache: what is timed and what it is held against.
struct DecodeCase {
  std::string work, policy;
  std::vector<std::pair<std::string, std::string>> parameters;
  int budget = 1024, points = 1;
  double must = 1.08, goal = 1.01;
  Synthetic shape{};
};

constexpr const char *slimmer_work = "kv_slimmer block of 512 at 2592 slots", *snapkv_work = "snapkv of 32k, 32 layers";
constexpr int decode_steps = 256, layers = 32, repeats = 5;

std::size_t l2_bytes() {
  int device = 0, bytes = 0;
  KV_CUDA_TRY(cudaGetDevice(&device));
  KV_CUDA_TRY(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return static_cast<std::size_t>(bytes);
}

/// Times passes of `points` equal points over copies of one made-up layer: `us(batch, stream)` after each. The first pass,
/// which does not count, is checked.
template <class Us>
std::vector<double> time_batch(const std::string& work, const Synthetic& shape, int copies, const PolicyEntry& entry,
                               const BoundPolicy& policy, const ReplaySettings& settings, int points, Us us) {
  Synthetic one_layer = shape;
  one_layer.layers = 1;
  const BenchTrace file(one_layer);
  Session session(file.file());
  TraceHeader header = session.header();
  header.layers.resize(static_cast<std::size_t>(copies), header.layers.front());
  const DeviceTrace trace(header);
  Upload upload;
  DeviceLayer layer(trace, session, 0, nullptr, upload);
  cudaStream_t stream = nullptr;
  const DevicePoint point{&entry, &policy, &settings};
  const std::vector<DevicePoint> equal(static_cast<std::size_t>(points), point);
  const BatchPlan plan(header, equal);
  const std::vector<BatchLayer> all(static_cast<std::size_t>(copies),
                                    {layer.seen(trace, settings.measured, plan.prefill, stream), nullptr});
  Batch batch(trace, header, plan, equal, all, 0, Timing::launches);
  std::vector<double> times;
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    batch.run(stream);
    const double mine = us(batch, stream);
    if (repeat > 0) times.push_back(mine);
    if (repeat > 0) continue;
    std::vector<ReplayResult> results(equal.size(), empty_result(header, settings));
    std::vector<std::exception_ptr> errors(equal.size());
    batch.collect(results, errors, stream);
    if (errors[0]) std::rethrow_exception(errors[0]);
    check_against(replay(session, entry, policy, settings), results.back(), work);
  }
  return times;
}

BenchRow time_decode(const DecodeCase& c, const Bandwidth& rates) {
  Synthetic shape = c.shape;
  shape.tokens = c.budget + decode_steps, shape.prompt_tokens = c.budget;
  const PolicyEntry& entry = find_policy(c.policy);
  const std::shared_ptr<BoundPolicy> policy = make_policy(entry, c.parameters);
  ReplaySettings settings;
  settings.budget = c.budget;
  settings.measured = parse_measure("decode", shape.tokens, shape.prompt_tokens);
  const auto us = time_batch(
      c.work, shape, layers, entry, *policy, settings, c.points,
      [&](const Batch& batch, cudaStream_t stream) { return batch.steps_us(stream) / decode_steps / c.points; });
  const double bytes = static_cast<double>(layers) * shape.kv_heads * c.budget * 2.0 * shape.head_dim *
                       static_cast<double>(size_of(shape.dtype));
  const bool fits = bytes <= static_cast<double>(l2_bytes());
  return row_of(c.work, "K and V held / read bandwidth", us, bytes / rates.read * 1e6, c.must, c.goal,
                fits ? "what is held fits the L2 cache: warm" : "");
}

/// One block of 512 tokens under KVSlimmer at its published budget: probed beside 2592 slots, which are merged to 2080 before it
/// attends. What a ninth block takes beyond eight.
BenchRow time_slimmer(const BenchPeers& peers) {
  constexpr int block = 512, budget = 2080, slots = budget + block, blocks = 9;
  const PolicyEntry& entry = find_policy("kv_slimmer");
  const auto policy = entry.make();
  ReplaySettings settings;
  settings.budget = budget, settings.block = {block}, settings.compress = Compress::prompt,
  settings.positions = Positions::span;
  std::vector<std::vector<double>> us;
  Synthetic shape;
  for (const int count : {blocks - 1, blocks}) {
    shape.tokens = count * block, shape.prompt_tokens = shape.tokens;
    settings.measured = parse_measure("prompt", shape.tokens, shape.prompt_tokens);
    us.push_back(time_batch(slimmer_work, shape, layers, entry, *policy, settings, 1,
                            [](const Batch& batch, cudaStream_t stream) { return batch.prompt_us(stream); }));
  }
  for (std::size_t i = 0; i < us[1].size(); ++i) us[1][i] -= median(us[0]);
  const auto product = [&](int before) {  // causal, of queries and keys or of probabilities and values
    return 2.0 * layers * shape.query_heads * block * (before + block / 2) * shape.head_dim;
  };
  const double products = 2 * product(slots) + 3 * product(budget);  // probabilities are two words
  return row_of(slimmer_work, "2 products of the probe, 3 of attention, at the GEMM rate", us[1],
                peers.gemm_flops > 0 ? products / peers.gemm_flops * 1e6 : 0, 1.8, 1.3,
                "32 layers; attention, probe, proxy, merge");
}

/// SnapKV's compression of a long prompt, whose log-sum-exps are known: votes, selection, rows moved. The heads of all layers as
/// 256 layers of one head.
BenchRow time_snapkv(const Bandwidth& rates) {
  constexpr int tokens = 32768, kept = 1024, heads = layers * 8;
  const PolicyEntry& entry = find_policy("snapkv");
  const auto policy = make_policy(entry, {{"window", "64"}, {"kernel", "5"}});
  Synthetic shape;
  shape.query_heads = 4, shape.kv_heads = 1, shape.tokens = tokens + 1, shape.prompt_tokens = tokens;
  ReplaySettings settings;
  settings.budget = kept, settings.compress = Compress::prompt;
  settings.measured = parse_measure("decode", shape.tokens, shape.prompt_tokens);
  const auto us =
      time_batch(snapkv_work, shape, heads, entry, *policy, settings, 1, [](Batch& batch, cudaStream_t stream) {
        const std::vector<double> phases = batch.times(stream).prompt_us;
        double sum = 0;
        for (std::size_t phase = 1; phase < phases.size(); ++phase) sum += phases[phase];  // all but append
        return sum;
      });
  const double row = 2.0 * shape.head_dim;
  return row_of(snapkv_work, "K read once + kept rows moved", us,
                heads * (tokens * row / rates.read + 2 * kept * 2 * row / rates.copy) * 1e6, 3, 2,
                "window of 64, 1024 kept; log-sum-exps are the prefill's");
}

/// Full attention and column sums of 16k tokens of one layer.
std::vector<BenchRow> time_attention(const BenchPeers& peers) {
  constexpr int tokens = 16384;
  Synthetic shape;  // normal data: on peaked attention the error is larger (6e-5 on the made-up traces' defaults)
  shape.tokens = tokens, shape.prompt_tokens = tokens - 1;
  shape.sinks = shape.outliers = 0, shape.heavy = shape.correlation = 0;
  shape.layers = 1;
  const BenchTrace file(shape);
  Session session(file.file());
  const DeviceTrace trace(session.header());
  Upload upload;
  DeviceLayer layer(trace, session, 0, nullptr, upload);
  const std::vector<int> every = parse_measure("all", tokens, tokens - 1);
  const FullLook look = layer.full_look(trace, every, true, true);
  const auto attend = [&] { block_attention(trace.shape(), look.tasks.data(), look.bounds, nullptr); };
  const auto add_up = [&] { column_masses(trace.shape(), look.tasks.data(), look.bounds, nullptr); };
  const Buffer<char> other(4 * l2_bytes());
  const auto sweep_cache = [&] { KV_CUDA_TRY(cudaMemsetAsync(other.data(), 0, other.size(), nullptr)); };
  const auto full = event_times(repeats, attend), cold_full = event_times(repeats, attend, sweep_cache);
  const auto sums = event_times(repeats, add_up), cold_sums = event_times(repeats, add_up, sweep_cache);
  // Some rows against the CPU engine; and every row's probabilities add up to 1.
  const std::vector<int> some = parse_measure("last:16", tokens, tokens - 1);
  const auto reference = session.reference(0, some);
  const std::vector<float> output = look.output.to_host(), columns = look.sums.to_host();
  double error2 = 0, output2 = 0, mass = 0;
  const auto group = static_cast<std::size_t>(trace.data.group), dv = static_cast<std::size_t>(trace.data.value_dim);
  for (std::size_t head = 0; head < static_cast<std::size_t>(shape.query_heads); ++head)
    for (std::size_t i = 0; i < some.size(); ++i)
      for (std::size_t c = 0; c < dv; ++c) {
        const std::size_t row = head / group * every.size() + static_cast<std::size_t>(some[i]);
        const double got = output[(row * group + head % group) * dv + c];
        const double expected = reference->output[(head * some.size() + i) * dv + c];
        error2 += (got - expected) * (got - expected), output2 += expected * expected;
      }
  for (const float x : columns) mass += x;
  const double rows = static_cast<double>(tokens) * shape.query_heads;
  if (!(error2 <= 1e-10 * output2) || !(std::abs(mass - rows) <= 1e-5 * rows))
    throw InternalError(
        fmt::format("bench: attention of 16k tokens: relative error {}, probabilities add up to {} of {}",
                    std::sqrt(error2 / output2), mass, rows));
  const double product = static_cast<double>(tokens) * tokens * shape.query_heads * shape.head_dim;  // the causal half
  BenchRow first = row_of("full attention of 16k, one layer", "cuDNN in bfloat16", full, peers.attention_16k_us, 1.6,
                          1.4, fmt::format("relative error {:.1e}", std::sqrt(error2 / output2)));
  BenchRow second =
      row_of("column sums of 16k, one layer", "QK^T at the GEMM rate", sums,
             peers.gemm_flops > 0 ? product / peers.gemm_flops * 1e6 : 0, 1.5, 1.35, "log-sum-exps known");
  first.cold_us = median(cold_full), second.cold_us = median(cold_sums);
  return {first, second};
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
  add({"", "zsmerge", {}, 1024, 1, 1.12, 1.03});  // merges with multiplicities
  add({"", "cam", {}, 1024, 1, 0, 0});            // 32 values a token are read and written beside
  for (const char* policy : {"h2o", "streaming_llm", "keydiff"}) add({"", policy, {}, 256, 1, 0.70, 0.50});
  add({"tova (per head)", "tova", per_head, 256, 1, 0.70, 0.50});
  for (const char* policy : {"weighted_kv", "zsmerge"}) add({"", policy, {}, 256, 1, 0.70, 0.50});
  add({"tova (as published, per layer)", "tova", {}, 1024, 1, 1.12, 1.03});
  Synthetic small;
  small.head_dim = 64, small.query_heads = 24, small.kv_heads = 8;
  add({"h2o, d 64, group 3,", "h2o", {}, 1024, 1, 1.08, 1.01, small});
  add({"", "h2o", {}, 1024, 16, 1.08, 1.01});
  for (const int budget : {4096, 8192}) add({"", "h2o", {}, budget, 1, 1.15, 1.02});
  return cases;
}

}  // namespace

BenchDevice bench_device(BenchRun& run, const BenchPeers& peers) {
  const std::vector<DeviceInfo> all = devices();
  if (all.empty()) throw CudaError("bench: no GPU: " + why_no_device());
  const Bandwidth rates = measure_bandwidth();
  BenchDevice device{all.front().name, rates.copy, rates.read, device_clocks(), {}};
  for (const DecodeCase& c : decode_cases()) run.add(c.work, [&] { return std::vector{time_decode(c, rates)}; });
  run.add("full attention and column sums of 16k, one layer", [&] { return time_attention(peers); });
  run.add(slimmer_work, [&] { return std::vector{time_slimmer(peers)}; });
  run.add(snapkv_work, [&] { return std::vector{time_snapkv(rates)}; });
  run.add(sweep_work, [&] { return std::vector{time_sweep()}; });
  const auto ours = std::ranges::find(run.rows(), "h2o 1024 slots", &BenchRow::work);
  if (peers.eager_h2o_us > 0 && ours != run.rows().end()) {
    const double us = ours->us;
    run.add("eager PyTorch, h2o 1024 slots", [&] {
      return std::vector{row_of("eager PyTorch, h2o 1024 slots", "the same on this engine",
                                {peers.eager_h2o_us * layers}, us, 0, 0, "the ratio says how much slower")};
    });
  }
  device.after = device_clocks();
  return device;
}

}  // namespace kv
