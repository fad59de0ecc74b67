// A batch's plan, and its units' memory.
#include <fmt/core.h>

#include <algorithm>

#include "kernels/batch.hpp"
#include "kernels/carver.hpp"
#include "kernels/row_memory.hpp"

namespace kv {
namespace {

/// Traits that shape what is launched. What only kernels read may differ within a batch.
bool same_flow(const Traits& a, const Traits& b) {
  return a.compresses == b.compresses && a.scope == b.scope && a.observation_window == b.observation_window &&
         a.window_once == b.window_once && a.window_past == b.window_past && a.observes == b.observes &&
         a.observes_prompt == b.observes_prompt && a.key_probe == b.key_probe && a.merges == b.merges &&
         a.select == b.select && a.picks == b.picks && a.needs_budget() == b.needs_budget() && a.probe == b.probe &&
         a.nearest == b.nearest && a.interval == b.interval && a.value_vector == b.value_vector &&
         a.key_gradient == b.key_gradient && a.future_queries.horizon == b.future_queries.horizon &&
         a.future_queries.first == b.future_queries.first && a.future_mass == b.future_mass &&
         a.output_norm == b.output_norm;
}

int largest_block(const BatchPlan& plan) {
  int most = 0;
  for (const BlockRange& block : plan.blocks) most = std::max(most, block.last - block.first);
  return most;
}

/// BatchPlan::prefill. Outputs are made with log-sum-exps of their own; a bias may change what a row sees.
Prefill prefill_of(const BatchPlan& plan) {
  const BlockRange& block = plan.blocks.front();
  if (block.phase != Phase::prompt || block.last - block.first == 1 || plan.biases ||
      plan.settings.positions != Positions::absolute)
    return {};
  const Traits& traits = plan.traits;
  const bool measured = !plan.settings.measured.empty() && plan.settings.measured.front() < block.last;
  if (plan.observes && traits.observes_prompt && !measured) return {block.first, block.last};
  if (!traits.compresses || traits.observation_window == 0 || traits.window_past) return {};
  return {std::max(block.first, block.last - traits.observation_window), block.last};
}

/// A unit's arrays, in the order in which they lie in memory.
void carve_unit(Unit& unit, Carver& carver, const TraceData& t, const BatchPlan& plan, const DeviceProgram& program) {
  const auto n = static_cast<std::size_t>(plan.capacity()), group = static_cast<std::size_t>(t.group),
             d = static_cast<std::size_t>(t.key_dim), dv = static_cast<std::size_t>(t.value_dim),
             tokens = static_cast<std::size_t>(t.tokens), element = static_cast<std::size_t>(bytes_of(t.elements)),
             rows = static_cast<std::size_t>(plan.look_rows());
  const Traits& traits = plan.traits;
  const bool streamed = streams(t.elements, t.key_dim, t.value_dim, t.group);
  const bool turns = plan.settings.positions != Positions::absolute, layer = traits.scope == Scope::layer;
  unit.capacity = plan.capacity();
  unit.keys = carver.take_bytes(n * d * element), unit.values = carver.take_bytes(n * dv * element);
  if (turns) {
    unit.rotated = carver.take_bytes(n * d * element), unit.rotated_at = carver.take<int>(n);
    unit.queries = carver.take_bytes(group * std::max<std::size_t>(1, rows) * d * element);
  }
  for (int** array : {&unit.token, &unit.multiplicity, &unit.order, &unit.rank, &unit.target})
    *array = carver.take<int>(n);
  for (int*& array : unit.work) array = carver.take<int>(n + 1);
  unit.state = carver.take_bytes(n * std::max<std::size_t>(1, program.slot_bytes()));
  unit.scratch = carver.take_bytes(n * std::max<std::size_t>(1, program.scratch_bytes()));
  unit.head_state = carver.take_bytes(std::max<std::size_t>(1, program.head_bytes()));
  if (traits.key_probe) unit.vector = carver.take<float>(d), unit.probe = carver.take<float>(n);
  if (traits.value_vector) unit.value_vector = carver.take<float>(dv);
  if (plan.biases) unit.bias = carver.take<float>(n);
  unit.score = carver.take<float>(n), unit.sums = carver.take<float>(n * group);
  unit.logits = carver.take<float>(static_cast<std::size_t>(logit_stride(plan.capacity())) * group);
  const auto row =
      static_cast<std::size_t>(logit_stride(static_cast<int>(plan.needs_full_logits() ? std::max(n, tokens) : n)));
  if (!streamed) unit.probabilities = carver.take<float>(row * group);
  for (int i = 0; i < 2; ++i)
    unit.score_at[i] = carver.take<float>(n), unit.safety_at[i] = carver.take<std::uint8_t>(n);
  if (layer) unit.all_score = carver.take<float>(n), unit.all_safety = carver.take<std::uint8_t>(n);
  unit.stays = carver.take<std::uint8_t>(n);
  if (traits.nearest != Nearest::none) unit.similarity = carver.take<float>(n), unit.norm = carver.take<float>(n);
  if (traits.key_gradient != KeyGradient::none) unit.gradient = carver.take<float>(n * d);
  if (plan.merges) {
    unit.list_size = static_cast<int>(2 * n), unit.list = carver.take<int>(2 * n);
    unit.plans = carver.take<Fold>(n), unit.targets = carver.take<FoldTarget>(n);
    unit.notes = carver.take<float>(tokens);
  }
  unit.parent = carver.take<int>(tokens), unit.lost_at = carver.take<int>(tokens);
  if (traits.future_queries.horizon > 0) {
    unit.query_sum = carver.take<double>(group * d), unit.query_outer = carver.take<double>(group * d * d);
    unit.query_mean = carver.take<float>(group * d), unit.query_covariance = carver.take<float>(group * d * d);
    unit.rotation = carver.take<double>(2 * static_cast<std::size_t>(t.pairs));
  }
  if (traits.future_mass)
    unit.future = carver.take<float>(n), unit.future_all = carver.take<double>(tokens),
    unit.future_left = carver.take<double>(tokens);
  if (plan.needs_full_logits())
    unit.full_logits = carver.take<float>(static_cast<std::size_t>(logit_stride(t.tokens)) * group);
  if (plan.settings.mass) unit.slot_mass = carver.take<long long>(n + 1);
  if (turns) unit.query_place = carver.take<int>(rows), unit.query_turned = carver.take<int2>(rows);
  unit.query_row = carver.take<int>(rows), unit.measured_row = carver.take<int>(plan.settings.measured.size());
  unit.block_lse = carver.take<float>(rows * group);
  unit.block_output = carver.take<float>(static_cast<std::size_t>(plan.output_rows()) * group * dv);
}

}  // namespace

bool BatchPlan::alike(const DevicePoint& a, const DevicePoint& b) {
  const ReplaySettings &x = *a.settings, &y = *b.settings;
  return a.entry == b.entry && same_flow(a.policy->traits(), b.policy->traits()) && x.block == y.block &&
         x.compress == y.compress && x.positions == y.positions && x.precision == y.precision &&
         x.measured == y.measured && x.mass == y.mass && x.allocation.kind == y.allocation.kind &&
         (x.allocation.kind == Allocation::Kind::uniform || x.budget == y.budget);
}

BatchPlan::BatchPlan(const TraceHeader& header, const std::vector<DevicePoint>& points)
    : blocks(blocks_of(header, points.front().settings->block)),
      traits(points.front().policy->traits()),
      settings(*points.front().settings) {
  const PolicyEntry& entry = *points.front().entry;
  observes = entry.observes && traits.observes, biases = entry.biases, merges = entry.merges && traits.merges;
  has_wo = std::ranges::any_of(header.layers, &LayerInfo::has_wo);
  smallest_budget = header.tokens, largest_budget = 1;
  for (const DevicePoint& point : points)
    for (const int budget : budgets_of(header, point.policy->traits(), *point.settings)) {
      smallest_budget = std::min(smallest_budget, budget), largest_budget = std::max(largest_budget, budget);
    }
  if (settings.allocation.kind == Allocation::Kind::adaptive) largest_budget = header.tokens;
  if (!traits.needs_budget()) smallest_budget = 0, largest_budget = header.tokens;
  prefill = prefill_of(*this);
}

int BatchPlan::capacity() const {
  const BlockRange& last = blocks.back();
  const int block = largest_block(*this), tokens = last.last;
  int decode = 0;
  for (const BlockRange& b : blocks) decode += b.phase == Phase::decode;
  const int growth = settings.compress == Compress::prompt ? decode : traits.interval;
  const int before =
      traits.probe == Probe::none ? 0 : block;  // a probed block joins a cache that is not compressed yet
  return static_cast<int>(
      std::min<long>(tokens, static_cast<long>(largest_budget) + before + std::max(block, 1) + growth));
}

int BatchPlan::look_rows() const {
  return std::max({1, largest_block(*this), std::min(traits.observation_window, blocks.back().last)});
}

int BatchPlan::output_rows() const {
  int most = 1;
  for (const BlockRange& block : blocks) {
    if (block.last - block.first == 1 && traits.probe == Probe::none) continue;
    const auto first = std::lower_bound(settings.measured.begin(), settings.measured.end(), block.first);
    const auto last = std::lower_bound(settings.measured.begin(), settings.measured.end(), block.last);
    // Outputs have the rows of the look that they are part of.
    if (last > first) most = std::max(most, observes ? block.last - block.first : static_cast<int>(last - first));
    if (traits.key_gradient != KeyGradient::none) most = std::max(most, block.last - block.first);
  }
  return most;
}

std::size_t Batch::bytes_of_unit(const TraceData& trace, const BatchPlan& plan, const DeviceProgram& program) {
  Unit unit;
  Carver counter;
  carve_unit(unit, counter, trace, plan, program);
  const auto measured = plan.settings.measured.size() * static_cast<std::size_t>(trace.group);
  return counter.used() +
         measured * (7 * sizeof(double) + (plan.has_wo ? static_cast<std::size_t>(trace.value_dim) * 4 : 0)) +
         plan.blocks.size() * sizeof(int) + sizeof(Unit) + sizeof(Progress) + sizeof(LostMassTask) +
         sizeof(AttentionTask);
}

Batch::Batch(const DeviceTrace& trace, const TraceHeader& header, const BatchPlan& plan,
             const std::vector<DevicePoint>& points, const std::vector<BatchLayer>& layers, int first_layer,
             Timing timing)
    : trace_(trace),
      header_(header),
      plan_(plan),
      layers_(layers),
      points_(points),
      first_layer_(first_layer),
      timing_(timing) {
  std::vector<const BoundPolicy*> policies;
  for (const DevicePoint& point : points) policies.push_back(point.policy);
  program_ = make_device_program(points.front().entry->doc.name, policies);
  make_units(points);

  const TraceData& t = trace_.data;
  row_bytes_ = row_bytes(short_ring);
  int device = 0, per_multiprocessor = 0, per_block = 0;
  KV_CUDA_TRY(cudaGetDevice(&device));
  KV_CUDA_TRY(cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  KV_CUDA_TRY(cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  KV_CUDA_TRY(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
  int l2 = 0;
  KV_CUDA_TRY(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  l2_bytes_ = static_cast<std::size_t>(l2);
  if (row_bytes_ + team_memory_bytes > static_cast<std::size_t>(per_block))
    throw CudaError(
        fmt::format("{} query heads of {} channels a KV head need {} bytes of shared memory, this GPU has {}: "
                    "use backend: cpu",
                    t.group, t.value_dim, row_bytes_, per_block));
  // As much as lets two blocks of a multiprocessor cover for each other.
  const std::size_t half = static_cast<std::size_t>(per_multiprocessor) / 2, taken = row_bytes_ + team_memory_bytes;
  record_room_ = half > taken ? (half - taken) / 16 * 16 : 0;
}

std::size_t Batch::row_bytes(int ring_bytes) const {
  const TraceData& t = trace_.data;
  const bool streamed = streams(t.elements, t.key_dim, t.value_dim, t.group);
  return static_cast<std::size_t>(
      row_memory_bytes(streamed, t.key_dim, t.value_dim, t.group, plan_.traits.key_probe, ring_bytes));
}

void Batch::make_units(const std::vector<DevicePoint>& points) {
  const TraceData& t = trace_.data;
  const auto heads = static_cast<std::size_t>(t.kv_heads), group = static_cast<std::size_t>(t.group),
             measured = plan_.settings.measured.size(), steps = plan_.blocks.size();
  const std::size_t count = points.size() * layers_.size() * heads;
  units_.resize(count);
  std::size_t at = 0;
  for (std::size_t p = 0; p < points.size(); ++p) {
    const ReplaySettings& settings = *points[p].settings;
    const std::vector<int> budgets = budgets_of(header_, points[p].policy->traits(), settings);
    for (std::size_t l = 0; l < layers_.size(); ++l)
      for (std::size_t h = 0; h < heads; ++h, ++at) {
        Unit& unit = units_[at];
        const LayerInfo& info = header_.layers[static_cast<std::size_t>(first_layer_) + l];
        HeadInfo& head = unit.info;
        head.layer = info.index, head.window = info.window, head.kv_head = static_cast<int>(h);
        head.group = t.group, head.key_dim = t.key_dim, head.value_dim = t.value_dim;
        head.budget = budgets[static_cast<std::size_t>(first_layer_) + l], head.prompt_tokens = t.prompt_tokens;
        head.scale = t.scale, head.seed = settings.seed;
        unit.protect = settings.protect, unit.point = static_cast<int>(p), unit.layer = static_cast<int>(l);
        unit.first_head = static_cast<int>(at - h), unit.layer_heads = t.kv_heads;
      }
  }
  Carver counter;
  Unit sample;
  carve_unit(sample, counter, t, plan_, *program_);
  memory_ = Buffer<char>(counter.used() * count);
  measures_ = Buffer<double>(count * group * measured * 6);
  slots_ = Buffer<int>(count * steps);
  lost_masses_ = Buffer<double>(count * group * measured);
  if (plan_.has_wo) delta_ = Buffer<float>(count * group * measured * static_cast<std::size_t>(t.value_dim));
  if (timing_ == Timing::phases) clocks_ = Buffer<unsigned>(count * steps * timed_phases);
  const std::vector<int> every = tokens_between(0, t.tokens);
  std::vector<int> of_token(every.size(), -1);
  for (std::size_t m = 0; m < measured; ++m)
    of_token[static_cast<std::size_t>(plan_.settings.measured[m])] = static_cast<int>(m);
  every_token_ = Buffer<int>(every), measured_ = Buffer<int>(plan_.settings.measured);
  measured_of_token_ = Buffer<int>(of_token);
  Carver carver(memory_.data());
  for (std::size_t u = 0; u < count; ++u) {
    Unit& unit = units_[u];
    carve_unit(unit, carver, t, plan_, *program_);
    unit.every_token = every_token_.data();
    double** metrics[] = {&unit.compared[0], &unit.compared[1], &unit.compared[3],
                          &unit.lost_mass,   &unit.mass_tv,     &unit.compared[2]};
    for (std::size_t i = 0; i < 6; ++i) *metrics[i] = measures_.data() + (i * count + u) * group * measured;
    if (plan_.has_wo) unit.delta = delta_.data() + u * group * measured * static_cast<std::size_t>(t.value_dim);
    unit.slots_at = slots_.data() + u * steps;
    if (timing_ == Timing::phases) unit.clocks = clocks_.data() + u * steps * timed_phases;
  }
  make_maps(counter.used());
  device_units_ = Buffer<Unit>(units_), progress_ = Buffer<Progress>(count), tasks_ = Buffer<AttentionTask>(count);
  lost_tasks_ = Buffer<LostMassTask>(count), meeting_ = Buffer<int>(count);
  if (plan_.traits.key_gradient != KeyGradient::none) gradient_tasks_ = Buffer<KeyGradientTask>(count);
  std::vector<LayerData> layers;
  for (const BatchLayer& layer : layers_) layers.push_back(layer.data);
  device_layers_ = Buffer<LayerData>(layers);
}

void Batch::make_maps(std::size_t unit_bytes) {
  const TraceData& t = trace_.data;
  if (!streams(t.elements, t.key_dim, t.value_dim, t.group)) return;
  const Unit& first = units_.front();
  const auto map_of = [&](const void* rows, int dim, int tile) {
    return make_tile_map(rows, dim, first.capacity, unit_bytes, units_.size(), tile);
  };
  for (auto& [ring_bytes, maps] : maps_) {
    const int tile = tile_slots(stream_width(t.key_dim, t.value_dim), ring_bytes);
    maps.keys = map_of(first.keys, t.key_dim, tile), maps.values = map_of(first.values, t.value_dim, tile);
    if (first.rotated) maps.rotated = map_of(first.rotated, t.key_dim, tile);
  }
  // Behind the last slot tiles hold what was there before, and count nothing of it: it only must not be NaN.
  const auto clear = [&](void* rows, int dim) {
    const auto bytes = static_cast<std::size_t>(first.capacity) * static_cast<std::size_t>(dim * bytes_of(t.elements));
    KV_CUDA_TRY(cudaMemset2D(rows, unit_bytes, 0, bytes, units_.size()));
  };
  clear(first.keys, t.key_dim), clear(first.values, t.value_dim);
  if (first.rotated) clear(first.rotated, t.key_dim);
  KV_CUDA_TRY(cudaStreamSynchronize(nullptr));  // streams of their own do not wait for it
}

}  // namespace kv
